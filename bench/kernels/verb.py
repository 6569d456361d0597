"""``hstu-trt bench kernels``: are the attention kernels right, and how fast are they beside PyTorch?

Each output is checked first, then all variants of a case and their references are timed in turn. Ratios compare
TFLOP/s, which for references that compute the same function are ratios of times. The softmax references do their own
work, a full causal mask, and count their own operations.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hstu_trt.bench import result_rows
from hstu_trt.bench.arguments import count, not_negative, positive, suite_parser
from hstu_trt.bench.kernels.cases import Dtype, KernelCase, select_cases
from hstu_trt.bench.kernels.plot import plot
from hstu_trt.bench.kernels.report import case_table, dry_run_table, page_table, readme_table
from hstu_trt.bench.kernels.variants import GEMM, GEMM_NAMES, REFERENCES, parse_variants
from hstu_trt.bench.row_verbs import draw_rows, print_rows
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.text import names_in

if TYPE_CHECKING:
    from hstu_trt.bench.kernels.runs import CaseResult, Entry

_REFERENCES = (*REFERENCES, GEMM)
GATE_EXIT_CODE = 1
FILES = ("kernels_*.jsonl",)
"""Files of rows in bench/results."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run measures."""

    cases: list[KernelCase]
    variants: tuple[str, ...] | None
    """None: each case's own."""
    reuse_plan: bool
    references: tuple[str, ...]
    rounds: int
    target_ms: float
    pause_ms: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """The plan that the options describe. Raises ConfigError."""
        references = names_in(args.references)
        for name in references:
            if name not in (*_REFERENCES, "none"):
                raise ConfigError(f"unknown reference {name!r}; there are {', '.join(_REFERENCES)} and none")
        variants = names_in(args.variants) if args.variants else None
        parse_variants(variants or ())
        plan = cls(
            cases=select_cases(names_in(args.cases)),
            variants=variants,
            reuse_plan=args.reuse_plan,
            references=references,
            rounds=args.rounds,
            target_ms=args.measure_ms,
            pause_ms=args.pause_ms,
        )
        if not args.quick:
            return plan
        few = [case for case in plan.cases if case.group == "table"] or plan.cases
        fast = tuple(name for name in references if name != "compile")
        return replace(plan, cases=few, references=fast, rounds=min(plan.rounds, 2), target_ms=15.0)


def main(argv: Sequence[str]) -> int:
    """Checks our attention kernels, then times them beside PyTorch; exit code 1 if an output is wrong."""
    parser = suite_parser("kernels", main.__doc__)
    parser.add_argument("--cases", default="table,sweep", help="names or groups (table, sweep), with commas between")
    parser.add_argument("--variants", help="e.g. 'fp16,fp8 packed,smxx fp16' (default: each case's own)")
    parser.add_argument("--reuse-plan", action="store_true", help="also time each variant with the plan in place")
    parser.add_argument("--references", default=",".join(_REFERENCES), help="%(default)s, or none")
    parser.add_argument("--rounds", type=count, default=3, help="(%(default)s)")
    parser.add_argument("--measure-ms", type=positive, default=20.0, help="length of one measurement (%(default)s)")
    parser.add_argument(
        "--pause-ms",
        type=not_negative,
        default=150.0,
        help="idle time before each measurement; 0: a GPU under constant load",
    )
    parser.add_argument("--quick", action="store_true", help="short rounds, table cases, no torch.compile")
    parser.add_argument("--out", type=Path, help="file for the rows (default: bench/results/kernels_<gpu>.jsonl)")
    parser.add_argument("--commit", help="of the rows, where this tree is no git checkout")
    parser.add_argument("--dry-run", action="store_true", help="list the cases and their floors; needs no GPU")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, everything else to stderr")
    args = parser.parse_args(argv)
    plan = Plan.of(args)
    if args.dry_run:
        print(dry_run_table(plan.cases))
        return 0
    if not args.json:
        return run(plan, args.out, args.commit)[1]
    with contextlib.redirect_stdout(sys.stderr):
        rows, code = run(plan, args.out, args.commit)
    print("[" + ",\n ".join(row.to_json() for row in rows) + "]")
    return code


def run(plan: Plan, out: Path | None, commit: str | None) -> tuple[list[result_rows.ResultRow], int]:
    """Measures case after case, appending the rows of each to ``out``; the rows, and the exit code."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA GPU here, and kernels are timed on one; --dry-run lists the cases")
    from hstu_trt.bench.kernels.runs import SUITE, SUSTAINED_SUITE, current_device, gemm_entries, gemm_rows

    device = torch.cuda.get_device_name()
    path = out or result_rows.RESULTS / f"kernels_{result_rows.device_slug(device)}.jsonl"
    provenance = result_rows.Provenance.here(device, result_rows.cuda_versions(), commit)
    gemms = gemm_entries(GEMM_NAMES, current_device()) if GEMM in plan.references else {}
    found: list[CaseResult] = []
    for case in plan.cases:
        result = _measure(plan, case, gemms, provenance)
        result_rows.append_rows(path, result.rows)
        found.append(result)
        for failure in result.failures:
            print(f"FAILED: {failure}", flush=True)
    ceilings = gemm_rows(
        [result.gemm_rounds_us for result in found], provenance, SUITE if plan.pause_ms > 0 else SUSTAINED_SUITE
    )
    result_rows.append_rows(path, ceilings)
    if ceilings:
        print(case_table(ceilings))
    rows = [row for result in found for row in result.rows] + ceilings
    failures = sum(len(result.failures) for result in found)
    print(f"{len(rows)} rows to {path}, {failures} failed checks, commit {provenance.commit}")
    return rows, GATE_EXIT_CODE if failures or not rows else 0


def _measure(plan: Plan, case: KernelCase, gemms: dict[Dtype, Entry], provenance: result_rows.Provenance) -> CaseResult:
    """One case, printed, and its memory given back."""
    import torch

    from hstu_trt.bench.kernels.runs import Options, current_device, measure_case

    variants = parse_variants(plan.variants or case.variants, reuse_plan=plan.reuse_plan)
    options = Options(variants, plan.references, plan.rounds, plan.target_ms, plan.pause_ms, current_device())
    result = measure_case(case, options, gemms, provenance)
    if result.rows:
        print(f"{case_table(result.rows)}\n", flush=True)
    for sentence in result.skipped:
        print(f"skipped: {sentence}", flush=True)
    # torch.compile keeps a handful of shapes per function and then falls back to eager.
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return result


def table_main(argv: Sequence[str]) -> int:
    """Prints the table of docs/speed.md."""
    return print_rows(argv, "table-kernels", table_main.__doc__, FILES, page_table)


def readme_main(argv: Sequence[str]) -> int:
    """Prints the README's table: attention beside public kernels."""
    return print_rows(argv, "table-attention", readme_main.__doc__, FILES, readme_table)


def plot_main(argv: Sequence[str]) -> int:
    """Draws TFLOP/s over history length, and a roofline."""
    return draw_rows(argv, "plot-kernels", plot_main.__doc__, FILES, plot)
