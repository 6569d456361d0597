"""Tokens of a kernel case. Shapes: H heads, D head width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_trt.bench.kernels.cases import Dtype, KernelCase
from hstu_trt.plugins.attention import quantise
from hstu_trt.plugins.parameters import Scales


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Queries, keys and values of a case: prefixes, user after user, then candidates.

    With a cache, its rows stand where prefixes stand: the first ``case.prefix_rows`` of k and v.
    """

    q: Tensor
    """[query rows, H, D]"""
    k: Tensor
    """[key rows, H, D]"""
    v: Tensor
    """[key rows, H, D]"""
    scales: Scales | None = None
    """fp8: [H] each."""

    def rows(self, queries: Tensor, keys: Tensor) -> Tokens:
        """Some rows of q, and of k and v."""
        q, k, v = (_rows(t, index) for t, index in ((self.q, queries), (self.k, keys), (self.v, keys)))
        return Tokens(q=q, k=k, v=v, scales=self.scales)

    def real(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the float64 values that they stand for."""
        if self.scales is None:
            return self.q.double(), self.k.double(), self.v.double()
        stored = (self.q, self.k, self.v)
        q, k, v = (t.double() * scale.double()[:, None] for t, scale in zip(stored, self.scales, strict=True))
        return q, k, v


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    # PyTorch does not index e4m3 everywhere, but bytes.
    return tensor.view(torch.uint8)[index].view(tensor.dtype) if tensor.element_size() == 1 else tensor[index]


def random_tokens(case: KernelCase, seed: int, device: torch.device | str, dtype: Dtype) -> Tokens:
    """Normally distributed tokens. fp8 ones are the fp16 ones of the same seed, quantised with a scale per head."""
    generator = torch.Generator(device=device).manual_seed(seed)
    half = torch.bfloat16 if dtype == "bf16" else torch.float16
    q, k, v = (
        torch.randn((rows, case.heads, case.dim), generator=generator, device=device).to(half)
        for rows in (case.query_rows, case.key_rows, case.key_rows)
    )
    if dtype != "fp8":
        return Tokens(q=q, k=k, v=v)
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (quantise(t, per_head=True) for t in (q, k, v))
    return Tokens(q=q8, k=k8, v=v8, scales=Scales(q_scale, k_scale, v_scale))
