"""1,000 random calls of every kernel: right, complete, within bounds, repeatable, and blind to other users.

Also a program, which prints one table: python tests/support/attention_cases.py --cases 1000 --seed 7
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from attention_calls import Sample, assemble, exact, row_scale, rows_of_users
from attention_inputs import DTYPES, Case, Tokens, make_tokens, random_case
from torch import Tensor

from hstu_trt.contract.text import text_table
from hstu_trt.plugins import attention as kernels
from hstu_trt.plugins.parameters import AttentionCall

FAST_KERNELS = ("sm90", "smxx")
ORACLE_KERNEL = "fp32"
GUARD_ROWS = 3
GUARD_COLUMNS = 16
MOST_FAILURES = 25

# Error of a row's norm, relative to the row. Weights are rounded to the type of v, the output to its own, and a row of
# one key carries both roundings whole: four half-ulps each.
ROW_ERROR = {"fp32": 2e-5, "fp16": 2e-3, "bf16": 1.6e-2, "fp8": 0.2}
# A weight may also be off by this much, whatever its size: by what tanh in hardware makes of a score far below zero, by
# e4m3's subnormals, and by scores rounded to fp32.
WEIGHT_ERROR = {"fp32": 0.0, "fp16": 3e-5, "bf16": 3e-5, "fp8": 2**-9}
SCORE_ERROR = 1e-6
# Outputs below the type's subnormals vanish.
LEAST_OUTPUT = {"fp32": 1e-12, "fp16": 2**-24, "bf16": 1e-12}


class Backend(Protocol):
    """Where calls run: the library on a GPU, or a stand-in."""

    device: torch.device

    def unsupported(self, call: AttentionCall, kernel: str, output: torch.dtype) -> str | None: ...

    def run(self, call: AttentionCall, kernel: str, out: Tensor) -> None: ...

    def pack(self, v: Tensor, prefix_offsets: Tensor, candidate_offsets: Tensor) -> Tensor: ...


class GpuBackend:
    """The library on this machine's GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        major, minor = torch.cuda.get_device_capability()
        self._capability = 10 * major + minor

    def unsupported(self, call: AttentionCall, kernel: str, output: torch.dtype) -> str | None:
        return kernels.unsupported(call, kernel, capability=self._capability, output_dtype=output)

    def run(self, call: AttentionCall, kernel: str, out: Tensor) -> None:
        kernels.attention(call, kernel=kernel, out=out)

    def pack(self, v: Tensor, prefix_offsets: Tensor, candidate_offsets: Tensor) -> Tensor:
        return kernels.pack_values(v, prefix_offsets, candidate_offsets)


class Guarded:
    """An output of NaN with NaN around it, in memory that a launch must leave alone."""

    def __init__(self, call: AttentionCall, dtype: torch.dtype) -> None:
        (rows, heads, _), dim = call.q.shape, call.v_dim
        width = heads * dim + GUARD_COLUMNS
        self._memory = torch.full((rows + 2 * GUARD_ROWS, width), float("nan"), dtype=dtype, device=call.q.device)
        self._before = self._bits().clone()
        self.out = self._memory[GUARD_ROWS : GUARD_ROWS + rows, : heads * dim].unflatten(1, (heads, dim))

    def _bits(self) -> Tensor:
        return self._memory.view(torch.int32 if self._memory.element_size() == 4 else torch.int16)

    def result(self, used: int) -> Tensor:
        """The rows in use. Raises AssertionError if one has NaN or Inf, or if other memory was written."""
        rows, (_, heads, dim) = self.out[:used], self.out.shape
        bad = ~rows.isfinite()
        assert not bad.any(), (
            f"{int(bad.sum())} of {bad.numel()} outputs not finite, first at {bad.nonzero()[0].tolist()}"
        )
        changed = self._bits() != self._before
        changed[GUARD_ROWS : GUARD_ROWS + used, : heads * dim] = False
        assert not changed.any(), f"written outside of the output: (row, column) {changed.nonzero()[0].tolist()}"
        return rows


@dataclass
class Tally:
    """What one kernel did on one type."""

    runs: int = 0
    refused: int = 0
    worst_row: float = 0.0
    """As a multiple of what a row may be off."""
    worst_l2: float = 0.0


@dataclass
class Summary:
    """All tallies, the reasons of refusals, and failures."""

    tallies: dict[tuple[str, str], Tally] = field(default_factory=lambda: defaultdict(Tally))
    reasons: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def text(self) -> str:
        rows = [
            (kernel, dtype, t.runs, t.refused, float(f"{t.worst_row:.3g}"), float(f"{t.worst_l2:.3g}"))
            for (kernel, dtype), t in sorted(self.tallies.items())
        ]
        table = text_table(("kernel", "type", "calls", "refused", "worst row / allowed", "worst L2"), rows)
        reasons = "\n".join(f"  {count:4} x {reason}" for reason, count in sorted(self.reasons.items()))
        failures = "\n".join(self.failures) or "no failures"
        return f"{table}\nrefused:\n{reasons}\n{failures}\n{self.seconds:.1f} s"

    def runs(self, kernel: str) -> int:
        """Calls that a kernel did."""
        return sum(tally.runs for (name, _), tally in self.tallies.items() if name == kernel)


def check_cases(
    cases: Iterable[Case], backend: Backend, names: Sequence[str], *, exact_each: int = 10, alone: bool = True
) -> Summary:
    """Checks all cases, each ``exact_each``-th against float64 too. Stops after 25 failures.

    alone: users must have the same bits alone, which is promised as long as items are cut into as many parts.
    """
    summary, begin = Summary(), time.monotonic()
    for number, case in enumerate(cases):
        try:
            failures = check_case(case, backend, names, summary, against_exact=number % exact_each == 0, alone=alone)
        except Exception as error:
            # After an error on the device nothing more can be run there.
            summary.failures.append(f"{type(error).__name__}: {error}\n    {case}")
            break
        summary.failures += [f"{failure}\n    {case}" for failure in failures]
        if len(summary.failures) >= MOST_FAILURES:
            break
    summary.seconds = time.monotonic() - begin
    return summary


def check_case(
    case: Case, backend: Backend, names: Sequence[str], summary: Summary, *, against_exact: bool, alone: bool = True
) -> list[str]:
    """Runs a case through the kernels that can do it; returns what is wrong."""
    tokens = make_tokens(case, backend.device)
    call = assemble(case, tokens, range(len(case.users)), backend.pack)
    used = sum(user.queries + user.candidates for user in case.users)
    failures = []
    plain = backend.unsupported(call, ORACLE_KERNEL, torch.float32) is None
    truth = exact(case, tokens) if against_exact or not plain else None
    if plain:
        oracle = Guarded(call, torch.float32)
        backend.run(call, ORACLE_KERNEL, oracle.out)
        by_kernel = Sample(torch.arange(used, device=backend.device), oracle.out[:used].double())
        truth = truth or by_kernel
        failures += _judge(case, tokens, ORACLE_KERNEL, oracle, truth, summary)
    assert truth is not None
    for name in names:
        output = DTYPES[case.output]
        if reason := backend.unsupported(call, name, output):
            summary.tallies[name, case.dtype].refused += 1
            summary.reasons[reason] += 1
            continue
        guarded = Guarded(call, output)
        backend.run(call, name, guarded.out)
        failures += _judge(case, tokens, name, guarded, truth, summary)
        failures += [f"{name}: {text}" for text in _invariants(case, tokens, name, guarded, backend, alone)]
    return failures


def _judge(case: Case, tokens: Tokens, name: str, guarded: Guarded, truth: Sample, summary: Summary) -> list[str]:
    """Compares with the truth; an oracle kernel's output is fp32 on whatever type, and held to fp32."""
    used = sum(user.queries + user.candidates for user in case.users)
    tally = summary.tallies[name, case.dtype]
    tally.runs += 1
    try:
        rows = guarded.result(used)
    except AssertionError as error:
        return [f"{name}: {error}"]
    if not truth.rows.numel():
        return []
    dtype, output = ("fp32", "fp32") if name == ORACLE_KERNEL else (case.dtype, case.output)
    difference = (rows[truth.rows].double() - truth.out).norm(dim=2)
    allowed = _allowed(case, tokens, truth, dtype, output)
    ratio = difference / allowed
    worst = ratio.max().item()
    tally.worst_row = max(tally.worst_row, worst)
    tally.worst_l2 = max(tally.worst_l2, (difference.norm() / truth.out.norm().clamp(min=1e-30)).item())
    if worst <= 1:
        return []
    row, head = divmod(int(ratio.argmax()), case.heads)
    return [f"{name}: row {int(truth.rows[row])}, head {head} is {worst:.3g} times further off than it may be"]


def _allowed(case: Case, tokens: Tokens, truth: Sample, dtype: str, output: str) -> Tensor:
    """How far each row's norm may be off, [rows, H]."""
    scale = torch.zeros(int(truth.rows.max()) + 1, dtype=torch.float64, device=truth.out.device)
    for n, rows in enumerate(rows_of_users(case, truth.out.device)):
        position = torch.arange(len(rows), device=rows.device) + case.users[n].prefix - case.users[n].queries
        inside = rows < len(scale)
        scale[rows[inside]] = row_scale(case, tokens, n, position).expand(len(rows))[inside]
    score = 4 * case.options.alpha * case.qk_dim**0.5 * case.outliers**2
    by_key = scale[truth.rows, None] * (WEIGHT_ERROR[dtype] + SCORE_ERROR * (1 + score))
    rounded = (ROW_ERROR[dtype] + ROW_ERROR[output] / 2) * truth.out.norm(dim=2)
    return rounded + by_key * (case.v_dim * max(case.max_len, 1)) ** 0.5 + LEAST_OUTPUT[output] * case.v_dim**0.5


def _invariants(case: Case, tokens: Tokens, name: str, first: Guarded, backend: Backend, alone: bool) -> Iterable[str]:
    """The same bits again, whatever other users hold, and alone if that is asked for."""
    used = sum(user.queries + user.candidates for user in case.users)
    everybody = range(len(case.users))

    def again(what: Tokens, chosen: Sequence[int]) -> Tensor:
        call = assemble(case, what, chosen, backend.pack)
        guarded = Guarded(call, first.out.dtype)
        backend.run(call, name, guarded.out)
        return guarded.out

    if not again(tokens, everybody)[:used].equal(first.out[:used]):
        yield "other bits when it ran again"
    if not case.users:
        return
    rows = rows_of_users(case, first.out.device)
    bad, one = case.seed % len(rows), (case.seed + 1) % len(rows)
    beside = again(tokens.poisoned(bad), everybody)
    for n, theirs in enumerate(rows):
        if n != bad and not beside[theirs].equal(first.out[theirs]):
            yield f"NaN in user {bad} changes user {n}"
    if alone and not again(tokens, [one])[: len(rows[one])].equal(first.out[rows[one]]):
        yield f"user {one} alone has other bits than in company"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("attention_cases", description="Random calls of the attention kernels.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--kernels", default=",".join(FAST_KERNELS))
    parser.add_argument("--only", type=int, help="the case of this number, as a failure shows it (Case(seed=...))")
    arguments = parser.parse_args(argv)
    first = arguments.seed * 1_000_000
    numbers = range(first, first + arguments.cases) if arguments.only is None else [arguments.only]
    cases = map(random_case, numbers)
    summary = check_cases(cases, GpuBackend(), arguments.kernels.split(","))
    print(summary.text())
    return bool(summary.failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
