"""fp8 (e4m3) inside the model: quantised products and quantised tokens of the attention.

A real value is a stored e4m3 value times a scale. Weights have a scale per output column and are stored in e4m3;
activations have one static scale per tensor, since TensorRT quantises them no finer. Traced, quantising becomes
QuantizeLinear and DequantizeLinear around a Gemm; on a CPU the same values are multiplied in the activations' dtype,
and on a GPU that has fp8 tensor cores, ``torch._scaled_mm`` multiplies the stored ones.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
# Scales are fp16, as the tensors that they go with. Below its normal range fp16 would round the scale itself; e4m3
# holds values down to 2^-9 of it, so nothing is lost above 1e-7.
SMALLEST_SCALE = 2.0**-14
_LARGEST_SCALE = torch.finfo(torch.float16).max
# Room above the largest activation of the calibration, since later requests may exceed it: saturating costs much, and a
# floating type loses nothing by a coarser scale.
HEADROOM = 2.0
# Rows and columns of an operand of the fp8 tensor cores come in steps of this.
TENSOR_CORE_STEP = 16
_FP8_CAPABILITY = (8, 9)


def scale_of(largest: Tensor) -> Tensor:
    """fp16 scale that brings a largest |value| to e4m3's 448; of any shape."""
    return (largest.float() / E4M3_MAX).clamp(SMALLEST_SCALE, _LARGEST_SCALE).to(torch.float16)


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale rounded to e4m3, saturating; the scale is one value, or one per row of axis 0."""
    steps = scale.float().reshape(-1, *[1] * (x.ndim - 1)) if scale.ndim else scale.float()
    return (x.float() / steps).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def from_e4m3(stored: Tensor, scale: Tensor) -> Tensor:
    """stored * scale in the scale's dtype; the scale is one value, or one per row of axis 0."""
    steps = scale.float().reshape(-1, *[1] * (stored.ndim - 1)) if scale.ndim else scale.float()
    return (stored.float() * steps).to(scale.dtype)


def quantise(x: Tensor, scale: Tensor) -> Tensor:
    """``to_e4m3``; a QuantizeLinear node when traced."""
    return torch.ops.hstu_trt.quantise(x, scale) if torch.compiler.is_exporting() else to_e4m3(x, scale)


def dequantise(stored: Tensor, scale: Tensor) -> Tensor:
    """``from_e4m3``; a DequantizeLinear node when traced."""
    return torch.ops.hstu_trt.dequantise(stored, scale) if torch.compiler.is_exporting() else from_e4m3(stored, scale)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Fp8Linear(nn.Module):
    """x W^T + b, with e4m3 weight [outputs, inputs], fp16 scales of its rows [outputs] and of the input []."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = _frozen(torch.zeros(outputs, inputs).to(E4M3))
        self.weight_scale = _frozen(torch.ones(outputs, dtype=torch.float16))
        self.input_scale = _frozen(torch.ones((), dtype=torch.float16))
        self.bias = _frozen(torch.zeros(outputs, dtype=torch.float16)) if bias else None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, largest_input: Tensor) -> Fp8Linear:
        """Quantises a weight [outputs, inputs]; ``largest_input`` is the largest |input| []."""
        module = cls(weight.shape[1], weight.shape[0], bias=bias is not None)
        scale = scale_of(weight.detach().abs().amax(dim=1))
        module.weight_scale = _frozen(scale)
        # Some checkpoints hold [inputs, outputs] and hand on a view; the tensor cores want a row's inputs side by side.
        module.weight = _frozen(to_e4m3(weight.detach(), scale).contiguous())
        module.input_scale = _frozen(scale_of(largest_input * HEADROOM))
        if bias is not None:
            module.bias = _frozen(bias.detach().to(torch.float16))
        return module

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not torch.compiler.is_exporting() and self._fits_tensor_cores(x):
            return self._on_tensor_cores(x)
        # In a model of fp16 these casts are none; a study of accuracy computes the rest of it in fp32.
        real = dequantise(quantise(x, self.input_scale), self.input_scale).to(x.dtype)
        weight = dequantise(self.weight, self.weight_scale).to(x.dtype)
        return functional.linear(real, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _fits_tensor_cores(self, x: Tensor) -> bool:
        outputs, inputs = self.weight.shape
        whole = inputs % TENSOR_CORE_STEP == 0 and outputs % TENSOR_CORE_STEP == 0
        return whole and x.dtype == torch.float16 and _capability(x.device) >= _FP8_CAPABILITY

    def _on_tensor_cores(self, x: Tensor) -> Tensor:
        scale = self.input_scale.float()
        rows = scale.expand(x.shape[0], 1).contiguous()
        columns = self.weight_scale.float()[None, :]
        return torch._scaled_mm(
            to_e4m3(x, scale), self.weight.t(), scale_a=rows, scale_b=columns, bias=self.bias, out_dtype=x.dtype,
            use_fast_accum=True,
        )  # fmt: skip


class Fp8Tokens(nn.Module):
    """Quantises q, k and v [T, H, D] of one layer: an fp16 scale [] each."""

    NAMES = ("q_scale", "k_scale", "v_scale")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            setattr(self, name, _frozen(torch.ones((), dtype=torch.float16)))

    @classmethod
    def of(cls, largest: Tensor) -> Fp8Tokens:
        """largest: the largest |q|, |k| and |v| [3]."""
        module = cls()
        for name, value in zip(cls.NAMES, largest, strict=True):
            setattr(module, name, _frozen(scale_of(value * HEADROOM)))
        return module

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """(q, k, v) in e4m3 and their scales fp32 [1], as the attention op takes them."""
        scales = [getattr(self, name) for name in self.NAMES]
        stored = [quantise(x, scale) for x, scale in zip((q, k, v), scales, strict=True)]
        return (*stored, *(scale.float().reshape(1) for scale in scales))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
