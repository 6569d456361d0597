"""The forward of a ranking model: tokens, attention layers, user vectors, scores.

In fp16, products add bias or residual themselves; in fp8, whoever reads their output next does. Between products stand
one kernel per step (plugins/layer.py): the norm before a product writes what the product reads, the attention writes
its output where the output product reads it, and the last layer computes what candidates need.
Shape suffixes: T tokens, P prefix tokens, C candidates, D model width, V heads * v_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_trt.contract.model import HstuConfig
from hstu_trt.engines.cuda.attend import Attend
from hstu_trt.engines.cuda.products import Product
from hstu_trt.engines.cuda.weights import ModelWeights, StuWeights, as_input
from hstu_trt.plugins import layer
from hstu_trt.plugins.layer_calls import Rows, TokenInputs


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A batch in the split layout: all prefixes (contextual tokens, then history), then all candidates."""

    content: Tensor
    """[T, E] table rows of the post id; of contextual tokens anything."""
    extra: Rows | None
    """What the additional features add: a table and its index, or a row per token."""
    contextual: Tensor | None
    """[B * slots, E] table rows; zeros for users whose sequence is too short."""
    actions: Tensor | None
    """int64 [T]"""
    timestamps: Tensor
    """int64 [T], 0 of contextual tokens."""
    prefix_offsets: Tensor
    candidate_offsets: Tensor
    norm: Tensor
    """fp32 [1] or [B]: N."""
    prefix_tokens: int


@dataclass(frozen=True, kw_only=True)
class _Tail:
    """The products of the last layer: keys and values of all tokens, u and q of candidates."""

    vk: Product
    uq: Product


class Network:
    """The model on one device.

    whole_items: see ``Attend``.
    """

    def __init__(self, config: HstuConfig, weights: ModelWeights, *, whole_items: bool = True) -> None:
        self.config, self.weights = config, weights
        self.whole_items = whole_items
        self._v_width, self._qk_width = config.heads * config.v_dim, config.heads * config.qk_dim
        v, qk = self._v_width, self._qk_width
        last = weights.layers[-1].uvqk
        self._tail = _Tail(
            vk=last.picked([slice(v, 2 * v), slice(2 * v + qk, 2 * v + 2 * qk)]),
            uq=last.picked([slice(0, v), slice(2 * v, 2 * v + qk)]),
        )

    @property
    def runs_on_kernels(self) -> bool:
        """Whether a forward is kernels only, which a graph can capture."""
        return layer.on_kernels(self.weights.tokens.position_table)

    def vectors_before_norm(self, batch: Batch, taps: list[Tensor] | None = None) -> Tensor:
        """Candidate rows [C, D] behind the last layer; with ``taps`` each layer's output [T, D] is appended to it."""
        x, normed = self._tokens(batch)
        attend = Attend(
            self.config, batch.prefix_offsets, batch.candidate_offsets, batch.norm, whole_items=self.whole_items
        )
        layers = self.weights.layers
        for number, stu in enumerate(layers if taps is not None else layers[:-1]):
            following = layers[number + 1] if number + 1 < len(layers) else None
            x, normed = self._layer(stu, following, x, normed, attend)
            if taps is not None:
                taps.append(x.clone())
        if taps is not None:
            return x[batch.prefix_tokens :]
        return self._last_layer(layers[-1], x[batch.prefix_tokens :], normed, batch.prefix_tokens, attend)

    def user_vectors(self, rows: Tensor, timestamps: Tensor) -> Tensor:
        """User vectors [C, D] of the last layer's rows; timestamps int64 [C]."""
        return layer.user_vectors(self.weights.vectors, self._combined(rows), timestamps)[0]

    def scores(self, rows: Tensor, timestamps: Tensor, items: Tensor, out: Tensor | None = None) -> Tensor:
        """Scores fp32 [C, tasks] from the last layer's rows and the item tower's, before its norm, [C, D]."""
        product = layer.user_vectors(
            self.weights.vectors, self._combined(rows), timestamps, items=(items, self.weights.item_tower.norm),
            scale=self.weights.head.input_scale,
        )[1]  # fmt: skip
        assert product is not None
        return self._head(product, out)

    def scores_of_vectors(self, vectors: Tensor, items: Tensor) -> Tensor:
        """Scores from user vectors and the item tower's rows, before its norm."""
        scale = self.weights.head.input_scale
        return self._head(layer.norm_rows(items, self.weights.item_tower.norm, factor=vectors, scale=scale), None)

    def _head(self, product: Tensor, out: Tensor | None) -> Tensor:
        weights = self.weights
        binary = sum(task.kind == "binary" for task in self.config.tasks)
        hidden = weights.head(product)
        return layer.scores(hidden, weights.head_norm, weights.score_weight, weights.score_bias, binary=binary, out=out)

    def _combined(self, rows: Tensor) -> Tensor:
        return rows if self.weights.combiner is None else self.weights.combiner(rows)

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The token stream and the first layer's norm of it."""
        weights, first = self.weights, self.weights.layers[0]
        inputs = TokenInputs(
            content=weights.content.before_norm(batch.content), extra=batch.extra, actions=batch.actions,
            contextual=self._contextual(batch), timestamps=batch.timestamps, prefix_offsets=batch.prefix_offsets,
            candidate_offsets=batch.candidate_offsets, prefix_tokens=batch.prefix_tokens,
        )  # fmt: skip
        return layer.encode_tokens(weights.tokens, inputs, first.input_norm, scale=first.uvqk.input_scale)

    def _contextual(self, batch: Batch) -> Tensor | None:
        if batch.contextual is None:
            return None
        weight, bias = self.weights.contextual, self.weights.contextual_bias
        assert weight is not None and bias is not None
        slots = weight.shape[0]
        if slots == 1:
            return torch.addmm(bias[0, 0], batch.contextual, weight[0])
        by_slot = batch.contextual.reshape(-1, slots, weight.shape[1]).transpose(0, 1)
        return torch.baddbmm(bias, by_slot, weight).transpose(0, 1).reshape(-1, weight.shape[2])

    def _layer(
        self, stu: StuWeights, following: StuWeights | None, x: Tensor, normed: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """All tokens in, all tokens out, with the following layer's norm of them."""
        v, qk = self._v_width, self._qk_width
        sq, sk, sv = _scale_values(stu)
        u, values, q, k = _projected(stu.uvqk, normed, ((v, None), (v, sv), (qk, sq), (qk, sk)))
        joined = self._joined(stu, u, (q, k, values), attend, tail=False)
        return self._add_output(stu, following, x, joined)

    def _last_layer(self, stu: StuWeights, x: Tensor, normed: Tensor, prefix: int, attend: Attend) -> Tensor:
        """Candidate rows alone; the others serve as keys and values."""
        v, qk = self._v_width, self._qk_width
        sq, sk, sv = _scale_values(stu)
        values, k = _projected(self._tail.vk, normed, ((v, sv), (qk, sk)))
        u, q = _projected(self._tail.uq, normed[prefix:], ((v, None), (qk, sq)))
        joined = self._joined(stu, u, (q, k, values), attend, tail=True)
        return self._add_output(stu, None, x, joined)[0]

    def _joined(
        self, stu: StuWeights, u: Tensor, qkv: tuple[Tensor, Tensor, Tensor], attend: Attend, *, tail: bool
    ) -> Tensor:
        """The output product's left operand [Tq, 3V]: SiLU(u), the attention, SiLU(u) * norm(attention)."""
        scale, width = stu.output.input_scale, self._v_width
        joined = u.new_empty((u.shape[0], 3 * width), dtype=u.dtype if scale is None else torch.float8_e4m3fn)
        # 1/N leaves little of the attention; the oracle's fp32 path keeps it, fp16 holds it to 3e-8.
        attended = joined[:, width : 2 * width] if scale is None else u.new_empty((u.shape[0], width))
        heads = self.config.heads
        q, k, v = (t.unflatten(1, (heads, -1)) for t in qkv)
        scales = None if stu.token_scales is None else stu.token_scales[:3]
        attend(q, k, v, scales, attended.unflatten(1, (heads, -1)), tail=tail)
        layer.gate(u, attended, stu.output_norm, joined, heads=heads, group_norm=self.config.group_norm, scale=scale)
        return joined

    def _add_output(
        self, stu: StuWeights, following: StuWeights | None, x: Tensor, joined: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x plus the output product, in place, and the following layer's norm of it."""
        delta = None
        if stu.output.is_fp8:
            delta = stu.output(joined)
        else:
            x = stu.output.add_to(x, joined)
        if following is None:
            return (x if delta is None else x.add_(delta)), x
        norm, scale = following.input_norm, following.uvqk.input_scale
        return x, layer.norm_rows(x, norm, delta=delta, scale=scale)


def _scale_values(stu: StuWeights) -> tuple[float, float, float] | tuple[None, None, None]:
    """What q, k and v are stored with."""
    scales = stu.token_scales
    return (None, None, None) if scales is None else (scales.q_value, scales.k_value, scales.v_value)


def _projected(product: Product, x: Tensor, outputs: Sequence[tuple[int, float | None]]) -> list[Tensor]:
    """Runs of columns of a product, in e4m3 where a scale is given."""
    if product.is_fp8 and any(scale is not None for _, scale in outputs) and layer.can_project(x, outputs):
        assert product.column_scale is not None and product.bias_fp32 is not None
        return layer.project(x, product.weight, product.column_scale, product.bias_fp32, outputs)
    parts = list(product(x).split([width for width, _ in outputs], dim=1))
    wanted = [(n, scale) for n, (_, scale) in enumerate(outputs) if scale is not None]
    if wanted:
        stored = layer.quantise_rows([(parts[n], scale) for n, scale in wanted])
        for (n, _), part in zip(wanted, stored, strict=True):
            parts[n] = part
    return parts


def additional_rows(weights: ModelWeights, rows: Tensor) -> Rows:
    """What the additional features add to each token, from their table rows [T, features * E]."""
    assert weights.additional is not None
    return Rows(rows=weights.additional(rows))


def item_rows(weights: ModelWeights, rows: Tensor) -> Tensor:
    """The item tower's rows [C, D] before its norm, from all of its features' table rows side by side."""
    return weights.item_tower.behind_first(weights.item_tower.first(as_input(rows, weights.item_tower.first)))
