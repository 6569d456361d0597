"""``hstu-trt bench tables-gpu``: lookups in tables in GPU memory and in pinned host memory, beside PyTorch's.

Our output is compared with PyTorch's bit by bit before it is timed. Tables are eighty times the L2 cache; ids rotate,
and outputs of what takes an output, so that no call finds its bytes there. Contenders that make their output write to
one place, which stays in L2: "one output" is ours under the same terms. Beside lookups stand copies of as many bytes:
cudaMemcpy, and PyTorch's fastest elementwise kernel. Contenders of a case are timed in turn, in CUDA graphs.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hstu_trt.bench.arguments import count, positive, some_of, suite_parser
from hstu_trt.bench.result_rows import RESULTS, Provenance, ResultRow, append_rows, cuda_versions, device_slug
from hstu_trt.bench.timing import Contender, GraphedCalls, Timing, time_in_turn
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.text import text_table

if TYPE_CHECKING:
    from torch import Tensor

    from hstu_trt.bench.tables.gpu_data import GatherCase
    from hstu_trt.plugins.embedding_tables import DeviceTable

SUITE = "tables gpu"
OURS = "EmbeddingLookup"
INDEX_SELECT = "torch index_select"
MEMCPY, COPY_KERNEL = "copy: cudaMemcpy", "copy: elementwise kernel"
REQUEST = 9048
"""Ids of one request of DLRMv3."""
PARTS = ("gather", "host", "columns", "refresh")
SETS = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run measures, and how long."""

    parts: tuple[str, ...]
    table_bytes: int
    host_bytes: int
    rounds: int
    target_ms: float
    compiled: bool
    fbgemm: bool


@dataclass
class Case:
    """Contenders of one case, with what their rows need."""

    name: str
    lookups: int
    moved_bytes: int
    contenders: dict[str, Contender] = field(default_factory=dict)
    checks: dict[str, dict[str, float]] = field(default_factory=dict)

    def rows(self, provenance: Provenance, plan: Plan, references: Sequence[str]) -> list[ResultRow]:
        """Times the contenders in turn."""
        times = time_in_turn(self.contenders, rounds=plan.rounds, target_ms=plan.target_ms)
        timings = {name: Timing.of(one) for name, one in times.items()}
        return [
            ResultRow(
                **vars(provenance), suite=SUITE, case=self.name, variant=name, median_us=timing.median_us,
                spread=timing.spread, gbps=self.moved_bytes / timing.median_us / 1e3,
                per_s=self.lookups / timing.median_us * 1e6,
                ratio_to={r: timings[r].median_us / timing.median_us for r in references if r in timings and r != name},
                checks=self.checks.get(name, {}),
            )
            for name, timing in timings.items()
        ]  # fmt: skip


def gather_cases(plan: Plan) -> Iterator[GatherCase]:
    """dim 512 and 128, fp16 and quantised rows, 1, 4 and 32 requests."""
    from hstu_trt.bench.tables.gpu_data import GatherCase

    for dtype, dim in (("fp16", 512), ("int8", 512), ("fp8", 512), ("fp16", 128), ("int8", 128)):
        for requests in (1, 4, 32):
            yield GatherCase(dtype=dtype, dim=dim, lookups=REQUEST * requests, table_bytes=plan.table_bytes)


def measure_gather(case: GatherCase, table: DeviceTable, provenance: Provenance, plan: Plan) -> list[ResultRow]:
    """One table in GPU memory."""
    import torch

    from hstu_trt.bench.tables import gpu_data as data
    from hstu_trt.bench.tables import gpu_fbgemm
    from hstu_trt.plugins.embedding import LookupOptions, lookup_tables

    ids, outs = data.random_ids(case.lookups, case.rows, SETS), data.outputs(case.lookups, case.dim, SETS)
    options = LookupOptions(output_dtype=torch.float16)
    found = Case(case.name, case.lookups, case.moved_bytes)
    calls: dict[str, Callable[[int], object]] = {
        OURS: lambda n: lookup_tables(ids[n], [table], options, out=outs[n]),
        f"{OURS}, one output": lambda n: lookup_tables(ids[n], [table], options, out=outs[0]),
    }
    if plan.fbgemm and case.dtype != "fp8":
        calls[gpu_fbgemm.NAME] = gpu_fbgemm.contender(table, ids)
    calls |= torch_gathers(case, table, ids, outs, compiled=plan.compiled and case.dtype == "fp16")
    expected = calls[INDEX_SELECT](0)
    assert isinstance(expected, torch.Tensor)
    expected = expected.clone()
    calls[OURS](0)
    found.checks[OURS] = {"rows_that_differ": data.differing_rows(expected, outs[0])}
    found.contenders = {name: graphed(call) for name, call in calls.items()}
    found.contenders |= copies(case.moved_bytes)
    rows = found.rows(provenance, plan, [INDEX_SELECT, "torch F.embedding", "torch.compile", gpu_fbgemm.NAME])
    return [_with_copy_share(row, rows) for row in rows]


def torch_gathers(
    case: GatherCase, table: DeviceTable, ids: list[Tensor], outs: list[Tensor], *, compiled: bool
) -> dict[str, Callable[[int], object]]:
    """PyTorch's ways to the same rows."""
    import torch
    from torch.nn.functional import embedding

    values, scales = table.hot, table.scales
    flat = [one[:, 0].contiguous() for one in ids]
    if scales is None:
        calls: dict[str, Callable[[int], object]] = {
            INDEX_SELECT: lambda n: torch.index_select(values, 0, flat[n], out=outs[n]),
            "torch F.embedding": lambda n: embedding(flat[n], values),
        }
        fused = torch.compile(lambda one: values[one], dynamic=True)
    else:
        codes = values.view(torch.int8)

        def dequantise(one: Tensor) -> Tensor:
            rows = torch.index_select(codes, 0, one).view(values.dtype)
            return (rows.to(torch.float32) * torch.index_select(scales, 0, one)[:, None]).to(torch.float16)

        calls = {INDEX_SELECT: lambda n: dequantise(flat[n])}
        fused = torch.compile(
            lambda one: (values[one].to(torch.float32) * scales[one][:, None]).to(torch.float16), dynamic=True
        )
    return calls | ({"torch.compile": lambda n: fused(flat[n])} if compiled else {})


def copies(moved_bytes: int) -> dict[str, Contender]:
    """Copies that read and write ``moved_bytes`` together."""
    import torch

    words = moved_bytes // 8 // 4 * 4
    sources = [torch.randint(0, 1 << 30, (words,), dtype=torch.int32, device="cuda") for _ in range(SETS)]
    targets = [torch.empty_like(source) for source in sources]
    return {
        MEMCPY: graphed(lambda n: targets[n].copy_(sources[n])),
        COPY_KERNEL: graphed(lambda n: torch.bitwise_not(sources[n], out=targets[n])),
    }


def graphed(call: Callable[[int], object]) -> GraphedCalls:
    """The call on each input set, in a graph."""
    return GraphedCalls([functools.partial(call, number) for number in range(SETS)])


def _with_copy_share(row: ResultRow, rows: Sequence[ResultRow]) -> ResultRow:
    """Adds our bandwidth as a share of the better copy's in the same case."""
    import dataclasses

    if not row.variant.startswith(OURS):
        return row
    best = max(one.gbps or 0.0 for one in rows if one.variant in (MEMCPY, COPY_KERNEL))
    return dataclasses.replace(row, checks=row.checks | {"share_of_copy": (row.gbps or 0.0) / best})


def run_gather(plan: Plan, provenance: Provenance) -> Iterator[list[ResultRow]]:
    """All gather cases; tables are made once for their cases."""
    import torch

    from hstu_trt.bench.tables.gpu_data import device_table

    key: tuple[str, int] | None = None
    table: DeviceTable | None = None
    for case in gather_cases(plan):
        if (case.dtype, case.dim) != key:
            table = None
            torch.compiler.reset()
            _free()
            key, table = (case.dtype, case.dim), device_table(case.dtype, case.rows, case.dim)
        assert table is not None
        yield measure_gather(case, table, provenance, plan)


def _free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def main(argv: Sequence[str]) -> int:
    """Measures the chosen parts, prints them, and adds rows to the results."""
    parser = suite_parser("tables-gpu", __doc__)
    parser.add_argument("--parts", type=some_of(PARTS, "parts"), default=PARTS, help=f"(default: {','.join(PARTS)})")
    parser.add_argument("--table-gib", type=positive, default=4.0, help="of a table in GPU memory (default: 4)")
    parser.add_argument("--host-gib", type=positive, default=8.0, help="of a table in host memory (default: 8)")
    parser.add_argument("--rounds", type=count, default=5, help="(default: 5)")
    parser.add_argument("--target-ms", type=positive, default=20.0, help="of each measurement (default: 20)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--fbgemm", type=Path, metavar="FOLDER", help="libraries of fbgemm-gpu, to be timed along")
    parser.add_argument("--out", type=Path, help="rows are added to it (default: bench/results/tables_<gpu>.jsonl)")
    parser.add_argument("--commit", help="of the rows, where this tree is no git checkout")
    args = parser.parse_args(argv)
    plan = Plan(
        parts=args.parts, table_bytes=int(args.table_gib * 2**30), host_bytes=int(args.host_gib * 2**30),
        rounds=args.rounds, target_ms=args.target_ms, compiled=not args.no_compile, fbgemm=args.fbgemm is not None,
    )  # fmt: skip
    if args.fbgemm:
        from hstu_trt.bench.tables import gpu_fbgemm

        gpu_fbgemm.load(args.fbgemm)
    return run(plan, args.out, args.commit)


def run(plan: Plan, out: Path | None, commit: str | None) -> int:
    """Measures part after part; exit code 1 if rows differed."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA GPU here, and these lookups run on one; `bench tables` times the CPU's")
    from hstu_trt.bench.tables.gpu_tiers import run_columns, run_host, run_refresh

    device = torch.cuda.get_device_name()
    path = out or RESULTS / f"tables_{device_slug(device)}.jsonl"
    provenance = Provenance.here(device, cuda_versions(), commit)
    runs: Mapping[str, Callable[[Plan, Provenance], Iterator[list[ResultRow]]]] = {
        "gather": run_gather, "host": run_host, "columns": run_columns, "refresh": run_refresh,
    }  # fmt: skip
    wrong = 0.0
    for part in plan.parts:
        for rows in runs[part](plan, provenance):
            append_rows(path, rows)
            wrong += sum(row.checks.get("rows_that_differ", 0.0) for row in rows)
            print(f"{rows[0].case}\n{listing(rows)}\n", flush=True)
    print(f"{device}, commit {provenance.commit}; rows added to {path}")
    return 1 if wrong else 0


def listing(rows: Sequence[ResultRow]) -> str:
    """Rows of a case as a table."""
    cells = [
        [
            row.variant, f"{row.median_us:.2f}", f"{row.spread:.0%}", f"{row.gbps or 0:.0f}",
            f"{(row.per_s or 0) / 1e6:.0f}", f"{row.ratio_to.get(INDEX_SELECT, 1):.2f} x",
            " ".join(f"{name} {value:.4g}" for name, value in row.checks.items()),
        ]
        for row in rows
    ]  # fmt: skip
    return text_table(["variant", "us", "spread", "GB/s", "M rows/s", "to index_select", "checks"], cells)
