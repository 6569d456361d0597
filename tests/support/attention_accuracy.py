"""Relative L2 errors of the kernels against float64, at lengths up to 16,384 and with outliers in the inputs.

Also a program, which prints one table: python tests/support/attention_accuracy.py
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from attention_calls import assemble, exact
from attention_cases import FAST_KERNELS, Backend, GpuBackend
from attention_inputs import DTYPES, Case, User, make_tokens

from hstu_trt.contract.gates import ATTENTION_GATES
from hstu_trt.contract.text import text_table
from hstu_trt.plugins.parameters import AttentionOptions

SAMPLED_ROWS = 400
CANDIDATES = 128
OUTLIERS = 8.0


@dataclass(frozen=True)
class Accuracy:
    """One kernel on one case."""

    kernel: str
    case: Case
    error: float
    """Relative L2 against float64 on the values that the kernel read."""
    error_from_fp16: float
    """fp8: against float64 on the fp16 values before they were quantised; else 0."""

    @property
    def faults(self) -> list[str]:
        gate = ATTENTION_GATES.relative_l2[self.case.dtype]
        found = [f"{self.error:.4g} is over {gate}"] if not self.error <= gate else []
        if not self.error_from_fp16 <= ATTENTION_GATES.relative_l2_from_fp16:
            found.append(f"from fp16: {self.error_from_fp16:.4g} is over {ATTENTION_GATES.relative_l2_from_fp16}")
        return [f"{self.kernel} {describe(self.case)}: {text}" for text in found]


def describe(case: Case) -> str:
    """Type, dim and length of a case of this module."""
    outliers = ", outliers" if case.outliers != 1 else ""
    return f"{case.dtype}, dim {case.qk_dim}, {case.users[0].prefix} + {CANDIDATES} tokens{outliers}"


def accuracy_cases(
    lengths: Sequence[int] = (100, 1000, 4096, 16_384), dims: Sequence[int] = (64, 128, 256)
) -> Iterator[Case]:
    """Every type, dim and length, plain and with one token in 128 larger by 8."""
    for dtype in ("fp16", "bf16", "fp8"):
        for dim in dims:
            for length in lengths:
                for outliers in (1.0, OUTLIERS):
                    yield Case(
                        seed=length + dim,
                        users=(User(0, length, length, CANDIDATES),) * (4 if length < 4096 else 1),
                        qk_dim=dim,
                        v_dim=dim,
                        dtype=dtype,
                        output="bf16" if dtype == "bf16" else "fp16",
                        options=AttentionOptions(dim**-0.5),
                        per_head_scales=True,
                        outliers=outliers,
                    )


def measure(case: Case, kernels: Iterable[str], backend: Backend) -> list[Accuracy]:
    """The kernels' errors on a case, over about 400 rows of each user."""
    tokens = make_tokens(case, backend.device)
    every = max(1, (case.users[0].queries + CANDIDATES) // SAMPLED_ROWS)
    truth = exact(case, tokens, every)
    truth_of_fp16 = None
    if case.dtype == "fp8":
        plain = dataclasses.replace(case, dtype="fp16")
        truth_of_fp16 = exact(plain, make_tokens(plain, backend.device), every)
    call = assemble(case, tokens, range(len(case.users)), backend.pack)
    results = []
    for kernel in kernels:
        if backend.unsupported(call, kernel, DTYPES[case.output]):
            continue
        out = torch.full_like(call.empty_output(DTYPES[case.output]), float("nan"))
        backend.run(call, kernel, out)
        errors = [
            ((out[truth.rows].double() - reference.out).norm() / reference.out.norm()).item() if reference else 0.0
            for reference in (truth, truth_of_fp16)
        ]
        results.append(Accuracy(kernel, case, *errors))
    return results


def table(results: Iterable[Accuracy]) -> str:
    """The worst case of each kernel and type."""
    worst: dict[tuple[str, str], Accuracy] = {}
    for one in results:
        key = (one.kernel, one.case.dtype)
        worst[key] = max(worst.get(key, one), one, key=lambda accuracy: accuracy.error)
    header = ("kernel", "worst case", "L2", "gate", "L2 from fp16")
    rows = [
        (kernel, describe(one.case), one.error, ATTENTION_GATES.relative_l2[dtype], one.error_from_fp16)
        for (kernel, dtype), one in sorted(worst.items())
    ]
    return text_table(header, [[f"{cell:.4g}" if isinstance(cell, float) else cell for cell in row] for row in rows])


def main() -> int:
    backend = GpuBackend()
    results = [one for case in accuracy_cases() for one in measure(case, FAST_KERNELS, backend)]
    faults = [fault for one in results for fault in one.faults]
    print(table(results), *(faults or ["no failures"]), sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
