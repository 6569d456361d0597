"""``hstu-trt bench tables``: lookups of the host tier beside PyTorch's on a CPU.

All tables are written or read whole before the first measurement: untouched memory would count as slowness. Each lies
where its library puts it: ours in huge pages, PyTorch's in what its allocator gives. Ids change from call to call, so
that no call finds its rows in a cache; contenders are timed in turn.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_trt.bench.arguments import count, not_negative, positive, suite_parser
from hstu_trt.bench.result_rows import RESULTS, Provenance, ResultRow, append_rows, cpu_name, package_versions
from hstu_trt.bench.timing import Timing, time_in_turn
from hstu_trt.bench.workloads.popularity import draw_items
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import Block, QuantisedRows
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.contract.text import text_table
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.native import default_threads

SUITE = "tables cpu"
RESULTS_FILE = RESULTS / "tables_cpu.jsonl"
STORED = {"fp16": "float16", "int8": "int8", "fp8": "float8_e4m3fn"}
REFERENCE = "torch index_select"
OURS = "host tier"
_BLOCK_ROWS = 1 << 15
_ID_SETS = 16
_QUIET = 0.1


@dataclass(frozen=True, kw_only=True)
class TableCase:
    """One table and the way it is looked up: fp16 rows come out."""

    dtype: str
    rows: int
    dim: int
    lookups: int
    exponent: float
    """Of the popularity's power law; 0: uniform."""

    @property
    def name(self) -> str:
        """As in ``int8 9048 of 2000000 x 512, uniform``."""
        law = f"zipf {self.exponent:g}" if self.exponent else "uniform"
        return f"{self.dtype} {self.lookups} of {self.rows} x {self.dim}, {law}"

    @property
    def moved_bytes(self) -> int:
        """Bytes that a lookup must read and write: rows, scales, ids, output."""
        stored = self.dim * (2 if self.dtype == "fp16" else 1) + (0 if self.dtype == "fp16" else 4)
        return self.lookups * (stored + 8 + 2 * self.dim)


@dataclass(frozen=True, kw_only=True)
class MeasuringPlan:
    """How often and how long to measure."""

    rounds: int
    target_ms: float
    wait_s: float = 0.0


class CpuCalls:
    """A call per set of ids, timed one by one.

    wait_s: a measurement during which other processes had more than a tenth of the machine is made again, for so long.
    """

    def __init__(self, call: Callable[[int], object], wait_s: float) -> None:
        self._call, self._wait_s, self._turn = call, wait_s, 0
        self.others = 0.0
        """Largest share of the machine that other processes had during a measurement."""

    def measure_us(self, target_ms: float) -> float:
        """Median time of a call in microseconds, of calls that last about ``target_ms`` together."""
        deadline = time.monotonic() + self._wait_s
        while True:
            began, others = time.monotonic(), others_cpu_s()
            median = self._median_us(target_ms)
            share = (others_cpu_s() - others) / (time.monotonic() - began) / (os.cpu_count() or 1)
            if share <= _QUIET or time.monotonic() > deadline:
                self.others = max(self.others, share)
                return median
            time.sleep(0.1)

    def _median_us(self, target_ms: float) -> float:
        times: list[float] = []
        while sum(times) < target_ms * 1e3 or len(times) < 5:
            self._turn = (self._turn + 1) % _ID_SETS
            began = time.perf_counter()
            self._call(self._turn)
            times.append((time.perf_counter() - began) * 1e6)
        return statistics.median(times)


def others_cpu_s() -> float:
    """CPU seconds that other processes and virtual machines have had so far; 0 where the kernel does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def blocks(case: TableCase) -> Iterator[Block]:
    """Seeded rows as they are stored."""
    for first in range(0, case.rows, _BLOCK_ROWS):
        rng, count = np.random.default_rng([first, case.dim]), min(_BLOCK_ROWS, case.rows - first)
        if case.dtype == "fp16":
            yield rng.standard_normal((count, case.dim), dtype=np.float32).astype(np.float16)
        else:
            # Codes at random are what quantised rows look like to a lookup; 0x7F and 0xFF would be NaN in e4m3.
            codes = rng.integers(0, 0x7F, (count, case.dim), dtype=np.uint8)
            scales = rng.random(count, dtype=np.float32) / 64
            yield QuantisedRows(codes.view(np.int8) if case.dtype == "int8" else codes, scales)


def torch_lookup(case: TableCase) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same lookup in PyTorch, over a table of its own."""
    dtype = {"fp16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[case.dtype]
    table = torch.empty(case.rows, case.dim, dtype=torch.float16 if case.dtype == "fp16" else torch.uint8)
    scales, first = torch.empty(case.rows), 0
    for block in blocks(case):
        part = slice(first, first + len(block))
        if isinstance(block, QuantisedRows):
            table[part] = torch.from_numpy(block.values.view(np.uint8))
            scales[part] = torch.from_numpy(block.scale)
        else:
            table[part] = torch.from_numpy(block)
        first += len(block)
    if case.dtype == "fp16":
        return lambda ids: torch.index_select(table, 0, ids)

    def lookup(ids: torch.Tensor) -> torch.Tensor:
        rows = torch.index_select(table, 0, ids).view(dtype)
        return rows.to(torch.float32).mul_(torch.index_select(scales, 0, ids)[:, None]).to(torch.float16)

    return lookup


def open_host(case: TableCase, folder: Path, *, native: bool, threads: int) -> HostTables:
    """Writes the table and opens it, read into memory."""
    if not (folder / "manifest.json").exists():
        config = TableConfig(name="t", rows=case.rows, dim=case.dim, dtype="float16", features=("t",))
        stored = write_table(folder, config, blocks(case), dtype=STORED[case.dtype])
        write_tables_manifest(folder, [stored], "hstu-trt bench tables", {})
    return HostTables.open(folder, resident=True, native=native, threads=threads)


def measure(case: TableCase, provenance: Provenance, plan: MeasuringPlan) -> list[ResultRow]:
    """Checks our rows against PyTorch's, then times the contenders in turn."""
    return next(measure_laws([case], provenance, plan))


def measure_laws(cases: Sequence[TableCase], provenance: Provenance, plan: MeasuringPlan) -> Iterator[list[ResultRow]]:
    """Rows case by case; the cases differ in how ids are drawn, and share a table."""
    threads, reference = torch.get_num_threads(), torch_lookup(cases[0])
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = (open_host(cases[0], Path(folder), native=native, threads=threads) for native in (True, False))
        for case in cases:
            yield _measure(case, {REFERENCE: reference, OURS: ours, "numpy": plain}, provenance, plan)


def _measure(
    case: TableCase, opened: Mapping[str, Any], provenance: Provenance, plan: MeasuringPlan
) -> list[ResultRow]:
    rng, reference = np.random.default_rng(1), opened[REFERENCE]
    ids = [draw_items(rng, case.lookups, rows=case.rows, exponent=case.exponent) for _ in range(_ID_SETS)]
    torch_ids = [torch.from_numpy(one) for one in ids]
    calls = {REFERENCE: CpuCalls(lambda turn: reference(torch_ids[turn]), plan.wait_s)}
    calls |= {name: _host_calls(host, ids, plan) for name, host in opened.items() if name != REFERENCE}
    wrong = {name: _wrong_rows(host, reference, ids[:2]) for name, host in opened.items() if name != REFERENCE}
    times = time_in_turn(calls, rounds=plan.rounds, target_ms=plan.target_ms)
    timings = {name: Timing.of(one) for name, one in times.items()}
    return [
        ResultRow(
            **vars(provenance),
            suite=SUITE,
            case=case.name,
            variant=name,
            median_us=timing.median_us,
            spread=timing.spread,
            gbps=case.moved_bytes / timing.median_us / 1e3,
            per_s=case.lookups / timing.median_us * 1e6,
            ratio_to={} if name == REFERENCE else {REFERENCE: timings[REFERENCE].median_us / timing.median_us},
            checks={"others_cpu": calls[name].others} | ({"rows_that_differ": wrong[name]} if name in wrong else {}),
        )
        for name, timing in timings.items()
    ]


def _host_calls(host: HostTables, ids: Sequence[NDArray], plan: MeasuringPlan) -> CpuCalls:
    return CpuCalls(lambda turn: host.lookup("t", ids[turn], dtype="float16"), plan.wait_s)


def _wrong_rows(host: HostTables, reference: Callable[[torch.Tensor], torch.Tensor], ids: Sequence[NDArray]) -> float:
    """Rows that differ from PyTorch's in a bit, over some sets of ids."""
    wrong = 0
    for one in ids:
        expected, found = reference(torch.from_numpy(one)).numpy(), host.lookup("t", one, dtype="float16")
        wrong += int((expected.view(np.uint16) != found.view(np.uint16)).any(axis=1).sum())
    return float(wrong)


def main(argv: Sequence[str]) -> int:
    """Measures the chosen cases, prints them, and adds rows to the results; exit code 1 if rows differed."""
    parser = suite_parser("tables", __doc__)
    parser.add_argument("--dtype", action="append", choices=STORED, help="default: all")
    parser.add_argument("--rows", type=count, default=2_000_000, help="of the table (default: 2000000)")
    parser.add_argument("--dim", type=count, default=512, help="(default: 512)")
    parser.add_argument("--lookups", type=count, default=9048, help="ids per call (default: 9048, a request of DLRMv3)")
    text = "0: uniform, as in DLRMv3, which is the default; may be repeated"
    parser.add_argument("--zipf", type=not_negative, action="append", metavar="EXPONENT", help=text)
    parser.add_argument("--threads", type=count, default=default_threads(), help="of each lookup (default: all CPUs)")
    parser.add_argument("--rounds", type=count, default=9, help="(default: 9)")
    parser.add_argument("--target-ms", type=positive, default=100.0, help="of each measurement (default: 100)")
    parser.add_argument(
        "--wait-s", type=not_negative, default=0.0, help="for a quiet moment, per measurement (default: 0)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS_FILE, help="rows are added to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    provenance = Provenance.here(f"{cpu_name()}, {args.threads} threads", package_versions(("torch", "numpy")))
    plan = MeasuringPlan(rounds=args.rounds, target_ms=args.target_ms, wait_s=args.wait_s)
    wrong = 0.0
    for dtype in args.dtype or STORED:
        cases = [
            TableCase(dtype=dtype, rows=args.rows, dim=args.dim, lookups=args.lookups, exponent=exponent)
            for exponent in args.zipf or (0.0,)
        ]
        for rows in measure_laws(cases, provenance, plan):
            append_rows(args.out, rows)
            wrong += sum(row.checks.get("rows_that_differ", 0.0) for row in rows)
            print(f"{rows[0].case}\n{_listing(rows)}", flush=True)
    print(f"{provenance.device}; rows added to {args.out}")
    if wrong:
        print(f"FAILED: {wrong:.0f} rows differ from PyTorch's", file=sys.stderr)
    return 1 if wrong else 0


def _listing(rows: Sequence[ResultRow]) -> str:
    cells = [
        [
            row.variant, f"{row.median_us / 1e3:.3f}", f"{row.spread:.0%}", f"{row.gbps or 0:.1f}",
            f"{(row.per_s or 0) / 1e6:.1f}", f"{row.checks['others_cpu']:.0%}",
            f"{row.ratio_to.get(REFERENCE, 1):.2f} x",
        ]
        for row in rows
    ]  # fmt: skip
    return text_table(["variant", "ms", "spread", "GB/s", "M rows/s", "others", "to PyTorch"], cells)
