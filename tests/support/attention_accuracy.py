"""Relative L2 errors of the kernels against float64, at lengths up to 16,384 and with outliers in the inputs.

A kernel has to round twice: SiLU of the scores to the type that the tensor cores multiply, and the output to its own.
The gates lie little above what that costs when thousands of keys count alike. With outliers few keys make up an
output, and what two roundings cost then hangs on those keys' mantissas. So there the same roundings of exact numbers,
the ideal kernel, are measured on the same rows, and a kernel may have their error if that is more than the gate.

Also a program, which prints one table: python tests/support/attention_accuracy.py
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from attention_calls import Sample, assemble, exact, rounded
from attention_cases import FAST_KERNELS, Backend, GpuBackend
from attention_inputs import DTYPES, Case, User, make_tokens
from torch import Tensor

from hstu_trt.contract.gates import ATTENTION_GATES
from hstu_trt.contract.text import text_table
from hstu_trt.plugins.parameters import AttentionOptions

SAMPLED_ROWS = 400
CANDIDATES = 128
OUTLIERS = 8.0
# The changes to a case with plain inputs, by name.
INPUTS = {"plain": {}, "outlier tokens": {"outliers": OUTLIERS}, "outlier dims": {"outlier_dims": OUTLIERS}}

# What arithmetic in fp32 may add to an ideal kernel's error.
OVER_IDEAL = 1.02
# No roundings excuse more than this: an ideal kernel further off has inputs beyond the type's range.
OVER_GATE = 1.5


@dataclass(frozen=True)
class Deviation:
    """A relative L2 error and what it is held to."""

    error: float
    ideal: float
    """Of the ideal kernel on the same rows."""
    gate: float
    strict: bool
    """Whether the gate alone counts."""

    @property
    def limit(self) -> float:
        if self.strict:
            return self.gate
        return min(max(self.gate, OVER_IDEAL * self.ideal), OVER_GATE * self.gate)

    def __str__(self) -> str:
        return f"{self.error:.4g} is over {self.limit:.4g} (gate {self.gate:.4g}, ideal kernel {self.ideal:.4g})"


@dataclass(frozen=True)
class Accuracy:
    """One kernel on one case."""

    kernel: str
    case: Case
    given: Deviation
    """From float64 on the values that the kernel read."""
    from_fp16: Deviation | None = None
    """fp8: from float64 on the fp16 values before they were quantised."""

    @property
    def faults(self) -> list[str]:
        named = (("", self.given), ("from fp16: ", self.from_fp16))
        bad = [f"{name}{one}" for name, one in named if one and not one.error <= one.limit]
        return [f"{self.kernel} {describe(self.case)}: {text}" for text in bad]

    @property
    def worst(self) -> float:
        """The larger error, as a share of its limit."""
        return max(one.error / one.limit for one in (self.given, self.from_fp16) if one)


def inputs_of(case: Case) -> str:
    """plain, outlier tokens or outlier dims."""
    return "outlier tokens" if case.outliers != 1 else "outlier dims" if case.outlier_dims != 1 else "plain"


def describe(case: Case) -> str:
    """Type, inputs, dim and length of a case of this module."""
    return f"{case.dtype}, {inputs_of(case)}, dim {case.qk_dim}, {case.users[0].prefix} + {CANDIDATES} tokens"


def accuracy_cases(
    lengths: Sequence[int] = (100, 1000, 4096, 16_384), dims: Sequence[int] = (64, 128, 256)
) -> Iterator[Case]:
    """Every type, dim and length; plain, with one token in 128 larger by 8, and with one dim in 64 of q and k."""
    for dtype in ("fp16", "bf16", "fp8"):
        for dim in dims:
            for length in lengths:
                plain = Case(
                    seed=length + dim,
                    users=(User(0, length, length, CANDIDATES),) * (4 if length < 4096 else 1),
                    qk_dim=dim,
                    v_dim=dim,
                    dtype=dtype,
                    output="bf16" if dtype == "bf16" else "fp16",
                    options=AttentionOptions(dim**-0.5),
                    per_head_scales=True,
                )
                yield from (dataclasses.replace(plain, **changes) for changes in INPUTS.values())


def measure(case: Case, kernels: Iterable[str], backend: Backend) -> list[Accuracy]:
    """The kernels' errors on a case, over about 400 rows of each user."""
    tokens = make_tokens(case, backend.device)
    every = max(1, (case.users[0].queries + CANDIDATES) // SAMPLED_ROWS)
    truth = exact(case, tokens, every)
    ideal = rounded(exact(case, tokens, every, DTYPES[case.dtype]).out, DTYPES[case.output])
    truth_of_fp16 = None
    if case.dtype == "fp8":
        plain = dataclasses.replace(case, dtype="fp16")
        truth_of_fp16 = exact(plain, make_tokens(plain, backend.device), every)
    call = assemble(case, tokens, range(len(case.users)), backend.pack)
    gates = ATTENTION_GATES
    results = []
    for kernel in kernels:
        if backend.unsupported(call, kernel, DTYPES[case.output]):
            continue
        out = torch.full_like(call.empty_output(DTYPES[case.output]), float("nan"))
        backend.run(call, kernel, out)
        rows = out[truth.rows].double()
        given = _deviation(case, rows, ideal, truth, gates.relative_l2[case.dtype])
        from_fp16 = truth_of_fp16 and _deviation(case, rows, ideal, truth_of_fp16, gates.relative_l2_from_fp16)
        results.append(Accuracy(kernel, case, given, from_fp16))
    return results


def _deviation(case: Case, rows: Tensor, ideal: Tensor, truth: Sample, gate: float) -> Deviation:
    errors = (((those - truth.out).norm() / truth.out.norm()).item() for those in (rows, ideal))
    return Deviation(*errors, gate, strict=inputs_of(case) == "plain")


def table(results: Iterable[Accuracy]) -> str:
    """The worst case of each kernel, type and kind of inputs."""
    worst: dict[tuple[str, ...], Accuracy] = {}
    for one in results:
        key = (one.kernel, one.case.dtype, inputs_of(one.case))
        worst[key] = max(worst.get(key, one), one, key=lambda accuracy: accuracy.worst)
    header = ("kernel", "worst case", "L2", "ideal", "limit", "L2 from fp16", "ideal", "limit")
    rows = [(one.kernel, describe(one.case), *_numbers(one.given), *_numbers(one.from_fp16)) for one in worst.values()]
    return text_table(header, rows)


def _numbers(one: Deviation | None) -> tuple[str, ...]:
    return tuple(f"{number:.4g}" for number in (one.error, one.ideal, one.limit)) if one else ("", "", "")


def main() -> int:
    backend = GpuBackend()
    results = [one for case in accuracy_cases() for one in measure(case, FAST_KERNELS, backend)]
    faults = [fault for one in results for fault in one.faults]
    print(table(results), *(faults or ["no failures"]), sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
