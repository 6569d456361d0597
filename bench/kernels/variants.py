"""Variants of the kernel benchmark: which kernel, type and preparation of ours, and what they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hstu_trt.bench.kernels.cases import DTYPES, Dtype
from hstu_trt.contract.errors import ConfigError
from hstu_trt.plugins.library import KERNELS

REFERENCES = {
    "eager": "torch eager fp16",
    "compile": "torch.compile fp16",
    "cudnn": "sdpa cudnn fp16 (softmax)",
    "flash": "sdpa flash fp16 (softmax)",
}
"""Option and column of each attention reference -> the variant of its rows."""
GEMM = "gemm"
GEMM_SIZE = 8192
GEMM_CASE = f"GEMM {GEMM_SIZE}"
GEMM_NAMES: dict[Dtype, str] = {"fp16": "torch.mm fp16", "bf16": "torch.mm bf16", "fp8": "torch._scaled_mm fp8"}
"""Variants of the rows that give the tensor cores' practical ceiling."""


@dataclass(frozen=True, kw_only=True)
class KernelVariant:
    """Spelled ``[kernel ]dtype[ packed][ planned]``, as in ``fp16``, ``smxx fp16`` or ``fp8 packed planned``."""

    dtype: Dtype
    kernel: str = "auto"
    """``auto``: the one that the dispatch table picks."""
    packed: bool = False
    """fp8: values come as value blocks. Without it they come as tokens, and packing them is part of the launch."""
    planned: bool = False
    """The workspace holds the plan of an earlier layer."""

    @property
    def name(self) -> str:
        """The spelling in rows and on the command line."""
        kernel = "" if self.kernel == "auto" else f"{self.kernel} "
        return f"{kernel}{self.dtype}{' packed' * self.packed}{' planned' * self.planned}"


def parse_variant(text: str) -> KernelVariant:
    """Reads the spelling of a variant. Raises ConfigError."""
    words = text.split()
    kernel = words.pop(0) if words and words[0] in KERNELS else "auto"
    dtype = next((d for d in DTYPES if words and words[0] == d), None)
    rest = words[1:]
    variant = KernelVariant(dtype=dtype or "fp16", kernel=kernel, packed="packed" in rest, planned="planned" in rest)
    if dtype is None or variant.name.split() != text.removeprefix("auto ").split():
        raise ConfigError(
            f"unknown variant {text!r}; it is [kernel ]dtype[ packed][ planned], with kernel {', '.join(KERNELS)} and "
            f"dtype {', '.join(DTYPES)}"
        )
    if variant.packed and dtype != "fp8":
        raise ConfigError(f"variant {text!r}: only fp8 values come packed")
    return variant


def parse_variants(texts: Sequence[str], *, reuse_plan: bool = False) -> list[KernelVariant]:
    """Reads several; ``reuse_plan`` adds to each its twin that finds the plan in the workspace."""
    variants = [parse_variant(text) for text in texts]
    if reuse_plan:
        variants += [KernelVariant(**{**vars(variant), "planned": True}) for variant in variants]
    return list(dict.fromkeys(variants))
