"""Our kernels as the benchmark calls them: a case, a variant and an input set become one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hstu_trt.bench.kernels.cases import KernelCase
from hstu_trt.bench.kernels.inputs import Tokens
from hstu_trt.bench.kernels.variants import KernelVariant
from hstu_trt.plugins.attention import AttentionPlan, attention, pack_values, unsupported
from hstu_trt.plugins.parameters import AttentionCall, AttentionOptions, Cache, Offsets


def alpha_of(case: KernelCase) -> float:
    """The usual factor on q.k."""
    return 1 / math.sqrt(case.dim)


@dataclass
class KernelCall:
    """One launch on one input set. Calling it enqueues the launch on the current stream, and returns the output."""

    attention: AttentionCall
    kernel: str
    out: Tensor
    plan: AttentionPlan | None = None

    def __call__(self) -> Tensor:
        return attention(self.attention, out=self.out, kernel=self.kernel, plan=self.plan)

    def unsupported(self) -> str | None:
        """The kernel's sentence on why it cannot do this call, or None."""
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
        return unsupported(self.attention, self.kernel, capability=capability, output_dtype=self.out.dtype)

    def prepare(self, *, planned: bool) -> None:
        """With ``planned``, the next run makes a plan, and those behind it on the same stream find it there."""
        if planned:
            self.plan = AttentionPlan()


def kernel_call(case: KernelCase, variant: KernelVariant, tokens: Tokens) -> KernelCall:
    """The launch of a variant on tokens that are of its dtype."""
    call = attention_call(case, tokens, packed=variant.packed)
    return KernelCall(
        call, variant.kernel, call.empty_output(torch.bfloat16 if variant.dtype == "bf16" else torch.half)
    )


def attention_call(case: KernelCase, tokens: Tokens, *, packed: bool) -> AttentionCall:
    """The call of a case. fp8 values are packed where that is asked for, and always in a cache."""
    device, keys = tokens.q.device, slice(case.prefix_rows if case.cached else 0, None)

    def offsets(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    prefix, none = offsets(case.histories), offsets([0] * case.users)
    candidates = offsets([case.candidates] * case.users)
    own = none if case.cached else prefix
    v = tokens.v[keys]
    return AttentionCall(
        q=tokens.q,
        k=tokens.k[keys],
        v=pack_values(v, own, candidates) if packed else v,
        offsets=Offsets(query=own, prefix=own, candidate=candidates),
        norm=torch.tensor([float(case.longest)], device=device),
        options=AttentionOptions(alpha=alpha_of(case)),
        cache=_cache(case, tokens, prefix, none) if case.cached else None,
        scales=tokens.scales,
    )


def _cache(case: KernelCase, tokens: Tokens, prefix: Tensor, none: Tensor) -> Cache:
    k, v = tokens.k[: case.prefix_rows], tokens.v[: case.prefix_rows]
    if tokens.scales is not None:
        # A cache is one section of value blocks; candidates would be the second half.
        blocks = pack_values(v, prefix, none)
        v = blocks[: len(blocks) // 2]
    return Cache(k=k, v=v, offsets=prefix)
