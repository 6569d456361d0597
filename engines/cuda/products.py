"""Matrix products of the model: cuBLAS in fp16, the fp8 tensor cores in e4m3, plain PyTorch on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True)
class Product:
    """x W^T + b. In e4m3, a real weight is the stored one times its row's scale, a real input times ``input_scale``."""

    weight: Tensor
    """[outputs, inputs] in the model's dtype or e4m3, rows side by side."""
    bias: Tensor | None = None
    """[outputs]"""
    input_scale: float | None = None
    """Scale that x is stored with; None: the product is not in fp8."""
    column_scale: Tensor | None = None
    """fp32 [1, outputs]: scale of the weight's rows times ``input_scale``."""
    dtype: torch.dtype
    """Of the output."""

    @classmethod
    def of(
        cls, dense: Mapping[str, Tensor], name: str, dtype: torch.dtype, device: torch.device, *, bias: bool = True
    ) -> Product:
        """The Linear layer ``name`` of a model folder's weights (``export.fp8.Fp8Linear`` in fp8)."""
        weight = dense[f"{name}.weight"].to(device)
        b = dense[f"{name}.bias"].to(device, dtype) if bias else None
        if weight.dtype != E4M3:
            return cls(weight=weight.to(dtype).contiguous(), bias=b, dtype=dtype)
        input_scale = float(dense[f"{name}.input_scale"])
        scales = dense[f"{name}.weight_scale"].float().to(device) * input_scale
        return cls(
            weight=weight.contiguous(), bias=b, input_scale=input_scale, column_scale=scales[None, :], dtype=dtype
        )

    def rows(self, first: int, last: int) -> Product:
        """The product that gives the outputs [first, last) alone."""
        return self.picked([slice(first, last)])

    def picked(self, parts: list[slice]) -> Product:
        """The product that gives some runs of the outputs, one behind the other."""
        scale = self.column_scale
        return Product(
            weight=torch.cat([self.weight[part] for part in parts]).contiguous(),
            bias=None if self.bias is None else torch.cat([self.bias[part] for part in parts]),
            input_scale=self.input_scale,
            column_scale=None if scale is None else torch.cat([scale[:, part] for part in parts], dim=1).contiguous(),
            dtype=self.dtype,
        )

    @functools.cached_property
    def bias_fp32(self) -> Tensor | None:
        return None if self.bias is None else self.bias.float()

    @property
    def is_fp8(self) -> bool:
        return self.column_scale is not None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, outputs] of x [T, inputs], which is in e4m3 for an fp8 product."""
        if self.is_fp8:
            return self._in_fp8(x)
        return torch.mm(x, self.weight.t()) if self.bias is None else torch.addmm(self.bias, x, self.weight.t())

    def add_to(self, sums: Tensor, x: Tensor) -> Tensor:
        """sums + x W^T, in place; of a product without bias, not in fp8."""
        return torch.addmm(sums, x, self.weight.t(), out=sums)

    def _in_fp8(self, x: Tensor) -> Tensor:
        assert self.column_scale is not None
        if not x.is_cuda or not _fits_tensor_cores(x, self.weight):
            out = (x.float() @ self.weight.float().t()) * self.column_scale
            return (out if self.bias is None else out + self.bias.float()).to(self.dtype)
        return torch._scaled_mm(
            x, self.weight.t(), scale_a=_ones(x.shape[0], x.device), scale_b=self.column_scale, bias=self.bias,
            out_dtype=self.dtype, use_fast_accum=True,
        )  # fmt: skip


def _fits_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    return weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0 and _capability(x.device) >= (8, 9)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _ones(rows: int, device: torch.device) -> Tensor:
    """fp32 [rows, 1]. Kept for good: captured graphs read it. The first call for a size comes before a capture."""
    return torch.ones((rows, 1), device=device)
