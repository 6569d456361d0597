"""What the runner is held against: the PyTorch model, in fp32 as the oracle, in fp16 as people would run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.bench.model.cases import Weights
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.tensors import Precision
from hstu_trt.export.attention import MaskOptions, valid_pairs
from hstu_trt.export.build import build_ranking_model
from hstu_trt.export.layers import StuLayer, StuStack, TokenLayout

REFERENCES = {"dense": "torch eager", "compiled": "torch.compile", "ours": "torch eager, our attention"}
"""How the PyTorch model computes attention -> the variant of its rows."""


class TorchModel:
    """The PyTorch model on the GPU, one request of one user at a time.

    attention: "dense" materialises the scores, "compiled" is that with whole layers inside torch.compile, "ours" runs
    our kernel between PyTorch's other operators, "blocked" is "dense" without the pairs that the mask leaves out.
    """

    def __init__(
        self, config: HstuConfig, weights: Weights, precision: Precision, tables: Mapping[str, Tensor], attention: str,
        device: str = "cuda",
    ) -> None:  # fmt: skip
        self._config, self._tables, self._device = config, tables, device
        self._dtype = torch.float32 if precision == "fp32" else torch.float16
        self._model = build_ranking_model(config, weights.dense, "random", precision, weights.fp8_sites).to(device)
        stack: Any = self._model._hstu_transducer._stu_module
        if attention == "blocked":
            stack.forward = _BlockedStack(stack)
        elif attention != "ours":
            stack.forward = _DenseStack(stack, compiled=attention == "compiled")

    def scores(self, feed: Mapping[str, NDArray]) -> Tensor:
        """Scores [candidates, tasks] of a feed of ``ranking_fused``, on the GPU."""
        with torch.inference_mode():
            inputs = {
                name: torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for name, array in feed.items()
            }
            rows = self._rows(inputs)
            vectors = self._model.hstu_stage({**inputs, **rows})
            return self._model.head_stage({**rows, "user_embeddings": vectors})

    def _rows(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self._config
        groups = {"uih": config.uih_features, "candidate": config.candidate_features}
        if config.contextual_slots:
            groups["contextual"] = config.contextual_slots
        rows = {}
        for group, features in groups.items():
            ids = inputs[f"{group}_ids"].reshape(-1, len(features))
            parts = [F.embedding(ids[:, n], self._tables[config.table_of(f).name]) for n, f in enumerate(features)]
            rows[f"{group}_embeddings"] = torch.cat(parts, dim=1).to(self._dtype)
        return rows


class _DenseStack:
    """``StuStack.forward`` for one user, the scores materialised, as the reference's PyTorch path has it."""

    def __init__(self, stack: StuStack, *, compiled: bool) -> None:
        self._layers, self._alpha = stack.layers, stack.alpha
        self._layer = torch.compile(_dense_layer, dynamic=False) if compiled else _dense_layer
        self._mask: tuple[tuple[int, int], Tensor] | None = None

    def __call__(
        self, prefix: Tensor, candidates: Tensor, layout: TokenLayout, norm: Tensor, taps: list[Tensor] | None = None
    ) -> Tensor:
        x, first = torch.cat([prefix, candidates]), prefix.shape[0]
        size = (first, candidates.shape[0])
        if self._mask is None or self._mask[0] != size:
            position = torch.arange(sum(size), device=x.device)
            self._mask = (size, valid_pairs(position, *size, MaskOptions()))
        mask = self._mask[1]
        for layer in self._layers[:-1]:
            x = self._layer(layer, x, mask, self._alpha, norm, 0)
        return self._layer(self._layers[-1], x, mask, self._alpha, norm, first)


def _dense_layer(layer: StuLayer, x: Tensor, mask: Tensor, alpha: float, norm: Tensor, first: int) -> Tensor:
    """A layer's rows from ``first`` on."""
    u, v, q, k = layer.project(x)
    q, k, v = (part.transpose(0, 1) for part in (q[first:], k, v))
    weights = F.silu(torch.matmul(q, k.transpose(1, 2)) * alpha) * mask[first:]
    attention = (torch.matmul(weights, v).float() / norm).transpose(0, 1)
    return layer.output(x[first:], u[first:], attention)


class _BlockedStack:
    """``StuStack.forward`` for one user: exact, a block of queries at a time against the keys that they may see."""

    def __init__(self, stack: StuStack, block: int = 1024) -> None:
        self._layers, self._alpha, self._block = stack.layers, stack.alpha, block

    def __call__(
        self, prefix: Tensor, candidates: Tensor, layout: TokenLayout, norm: Tensor, taps: list[Tensor] | None = None
    ) -> Tensor:
        x, first = torch.cat([prefix, candidates]), prefix.shape[0]
        for number, layer in enumerate(self._layers):
            begin = first if number + 1 == len(self._layers) else 0
            u, v, q, k = layer.project(x)
            q, k, v = (part.transpose(0, 1) for part in (q, k, v))
            heads = self._attention(q, k, v, first, begin)
            x = layer.output(x[begin:], u[begin:], heads.float().transpose(0, 1) / norm)
        return x

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, first: int, begin: int) -> Tensor:
        """Of the rows from ``begin`` on, [heads, rows, v_dim]; candidates see the prefix and themselves."""
        out = torch.empty_like(v[:, begin:])
        for row in range(begin, first, self._block):
            last = min(row + self._block, first)
            weights = self._weights(q[:, row:last], k[:, :last])
            weights[:, :, row:].tril_()
            torch.matmul(weights, v[:, :last], out=out[:, row - begin : last - begin])
        items = slice(first, None)
        seen = torch.matmul(self._weights(q[:, items], k[:, :first]), v[:, :first])
        own = F.silu((q[:, items] * k[:, items]).sum(-1, keepdim=True) * self._alpha)
        out[:, first - begin :] = seen + own * v[:, items]
        return out

    def _weights(self, q: Tensor, k: Tensor) -> Tensor:
        return F.silu(torch.matmul(q, k.transpose(1, 2)).mul_(self._alpha), inplace=True)
