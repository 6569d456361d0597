"""The GPU lookup benchmark beyond one table in GPU memory: rows over the bus, several tables, exchanges of versions."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hstu_trt.bench.result_rows import Provenance, ResultRow
from hstu_trt.bench.tables import gpu_data as data
from hstu_trt.bench.tables.gpu import OURS, REQUEST, SETS, SUITE, Case, Plan, graphed
from hstu_trt.bench.timing import Timing
from hstu_trt.plugins.embedding import LookupOptions, lookup_tables
from hstu_trt.plugins.embedding_tables import DeviceTable, LiveTables

HALF = LookupOptions(output_dtype=torch.float16)
DIM = 512
CPU_WAY = "torch CPU gather and copy"
LINK = "link: cudaMemcpy of pinned memory"
ZIPF = 1.05
HOT_SHARES = (0.01, 0.1)


@dataclass(frozen=True)
class HostCalls:
    """Calls that the CPU takes part in, each waited for."""

    call: Callable[[int], object]

    def measure_us(self, target_ms: float) -> float:
        """Median time of one call in microseconds."""
        times: list[float] = []
        end = time.perf_counter() + target_ms / 1e3
        while len(times) < 5 or time.perf_counter() < end:
            begin = time.perf_counter()
            self.call(len(times) % SETS)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
        return statistics.median(times)


def run_host(plan: Plan, provenance: Provenance) -> Iterator[list[ResultRow]]:
    """Zero-copy of all rows, then a hot set in front of them."""
    host = data.HostRows.make(plan.host_bytes // (2 * DIM), DIM)
    try:
        for part, requests in ((1, 1), (1, 4), (2, 1), (8, 1), (8, 4)):
            rows = host.rows[: len(host.rows) // part]
            yield measure_zero_copy(rows, REQUEST * requests, provenance, plan)
        for requests in (1, 4):
            for share in HOT_SHARES:
                yield measure_hot_set(host, REQUEST * requests, share, provenance, plan)
    finally:
        host.release()


def measure_zero_copy(rows: Tensor, count: int, provenance: Provenance, plan: Plan) -> list[ResultRow]:
    """Every row over the bus, against the CPU's gather into pinned memory with one copy."""
    table = DeviceTable(hot=rows.new_empty((0, DIM), device="cuda"), cold=rows)
    ids, outs = data.random_ids(count, len(rows), SETS), data.outputs(count, DIM, SETS)
    on_host = [one[:, 0].cpu() for one in ids]
    staging = torch.empty((count, DIM), dtype=torch.float16, pin_memory=True)
    case = Case(f"host fp16 {count} of {len(rows)} x {DIM}", count, count * 2 * DIM)

    def cpu_way(n: int) -> None:
        torch.index_select(rows, 0, on_host[n], out=staging)
        outs[n].copy_(staging, non_blocking=True)

    cpu_way(0)
    expected = outs[0].clone()
    lookup_tables(ids[0], [table], HALF, out=outs[0])
    case.checks[OURS] = {"rows_that_differ": data.differing_rows(expected, outs[0])}
    case.contenders = {
        OURS: graphed(lambda n: lookup_tables(ids[n], [table], HALF, out=outs[n])),
        LINK: graphed(lambda n: outs[n].copy_(staging, non_blocking=True)),
        CPU_WAY: HostCalls(cpu_way),
        f"{OURS}, waited for": HostCalls(lambda n: lookup_tables(ids[n], [table], HALF, out=outs[n])),
    }
    return case.rows(provenance, plan, [CPU_WAY, LINK])


def measure_hot_set(
    host: data.HostRows, count: int, share: float, provenance: Provenance, plan: Plan
) -> list[ResultRow]:
    """Rows in the order of their popularity, the first of them in GPU memory; against hits and misses apart."""
    rows, hot_rows = len(host.rows), int(len(host.rows) * share)
    hot = host.rows[:hot_rows].cuda()
    table = DeviceTable(hot=hot, cold=host.rows[hot_rows:])
    ids, outs = data.random_ids(count, rows, SETS, exponent=ZIPF), data.outputs(count, DIM, SETS)
    hits = [one[one < hot_rows][:, None] for one in ids]
    misses = [one[one >= hot_rows][:, None] for one in ids]
    case = Case(f"hot set {share:g} zipf {ZIPF:g}, fp16 {count} of {rows} x {DIM}", count, count * 2 * DIM)
    lookup_tables(ids[0], [table], HALF, out=outs[0])
    expected = host.rows[ids[0][:, 0].cpu()].cuda()
    rate = sum(len(one) for one in hits) / (count * SETS)
    case.checks[OURS] = {"rows_that_differ": data.differing_rows(expected, outs[0]), "hit_rate": rate}
    case.contenders = {
        OURS: graphed(lambda n: lookup_tables(ids[n], [table], HALF, out=outs[n])),
        "hits alone": graphed(lambda n: lookup_tables(hits[n], [table], HALF, out=outs[n][: len(hits[n])])),
        "misses alone": graphed(lambda n: lookup_tables(misses[n], [table], HALF, out=outs[n][: len(misses[n])])),
    }
    found = case.rows(provenance, plan, [])
    ours, predicted = found[0], found[1].median_us + found[2].median_us
    ours.checks["predicted_us"] = predicted
    ours.checks["to_predicted"] = ours.median_us / predicted
    return found


def run_columns(plan: Plan, provenance: Provenance) -> Iterator[list[ResultRow]]:
    """Several tables side by side, against a gather each and a cat."""
    for count, dims in ((REQUEST, (512, 512, 512)), (REQUEST * 4, (512, 512, 512)), (REQUEST, (128,) * 4)):
        tables = [data.device_table("fp16", plan.table_bytes // (4 * dim), dim) for dim in dims]
        ids = data.random_ids(count * len(dims), len(tables[0].hot), SETS)
        sets = [one.view(count, len(dims)) for one in ids]
        outs = data.outputs(count, sum(dims), SETS)
        yield measure_columns(sets, tables, outs, provenance, plan)
        del tables, ids, sets, outs
        torch.cuda.empty_cache()


def measure_columns(
    ids: list[Tensor], tables: list[DeviceTable], outs: list[Tensor], provenance: Provenance, plan: Plan
) -> list[ResultRow]:
    """One launch, against ``index_select`` per table and ``cat``."""
    count, dims = len(ids[0]), [table.dim for table in tables]
    columns = [[one[:, k].contiguous() for k in range(len(dims))] for one in ids]

    def apart(n: int) -> Tensor:
        rows = [torch.index_select(table.hot, 0, one) for table, one in zip(tables, columns[n], strict=True)]
        return torch.cat(rows, dim=1, out=outs[n])

    name = f"{len(dims)} tables x {dims[0]}, fp16 {count}"
    case = Case(name, count, count * (4 * sum(dims) + 8 * len(dims)))
    expected = apart(0).clone()
    lookup_tables(ids[0], tables, HALF, out=outs[0])
    case.checks[OURS] = {"rows_that_differ": data.differing_rows(expected, outs[0])}
    case.contenders = {
        OURS: graphed(lambda n: lookup_tables(ids[n], tables, HALF, out=outs[n])),
        "torch index_select and cat": graphed(apart),
    }
    return case.rows(provenance, plan, ["torch index_select and cat"])


def run_refresh(plan: Plan, provenance: Provenance) -> Iterator[list[ResultRow]]:
    """Times of replayed lookups one by one: with a table that stays, and while versions of it are exchanged."""
    rows = plan.table_bytes // 4 // (2 * DIM)
    versions = [DeviceTable(hot=torch.full((rows, DIM), v, dtype=torch.float16, device="cuda")) for v in (1.0, 2.0)]
    live = LiveTables((versions[0],))
    ids, out, latch = data.random_ids(REQUEST, rows, 1)[0], data.outputs(REQUEST, DIM, 1)[0], live.word.clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    lookup_tables(ids, live, HALF, out=out, latch=latch)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        lookup_tables(ids, live, HALF, out=out, latch=latch)
    quiet = replay_times(graph, stream, out)
    stop = threading.Event()
    fresh = np.full((rows, DIM), 3.0, np.float16)
    refresher = threading.Thread(target=refresh_until, args=(live, torch.from_numpy(fresh).pin_memory(), stop))
    refresher.start()
    busy = replay_times(graph, stream, out)
    stop.set()
    refresher.join()
    yield [
        refresh_row("a table that stays", quiet, rows, provenance),
        refresh_row("versions exchanged meanwhile", busy, rows, provenance),
    ]


@dataclass(frozen=True)
class Replays:
    """What a series of replays showed."""

    times_us: list[float]
    mixed: int
    """Lookups with rows of more than one version."""
    versions: int
    """Changes of version seen."""


def replay_times(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, out: Tensor, seconds: float = 3.0) -> Replays:
    """Replays for some seconds, each waited for and looked at."""
    times, mixed, changes, last = [], 0, 0, 0.0
    with torch.cuda.stream(stream):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            graph.replay()
            stream.synchronize()
            times.append((time.perf_counter() - begin) * 1e6)
            low, high = torch.aminmax(out)
            mixed += int(low.item() != high.item())
            changes += int(low.item() != last)
            last = low.item()
    return Replays(times, mixed, changes)


def refresh_until(live: LiveTables, fresh: Tensor, stop: threading.Event) -> None:
    """Loads a version beside the one in use and exchanges them, on a stream of its own."""
    stream, number = torch.cuda.Stream(), 3
    with torch.cuda.stream(stream):
        while not stop.is_set():
            fresh.fill_(number % 100)
            loaded = fresh.to("cuda", non_blocking=True)
            live.publish([DeviceTable(hot=loaded, version=number)])
            stream.synchronize()
            number += 1


def refresh_row(variant: str, found: Replays, rows: int, provenance: Provenance) -> ResultRow:
    """Median, p99 and slowest."""
    times = np.asarray(found.times_us)
    timing = Timing(median_us=float(np.median(times)), spread=0.0)
    checks = {
        "p99_us": float(np.quantile(times, 0.99)), "slowest_us": float(times.max()), "calls": float(len(times)),
        "exchanges_seen": float(found.versions - 1), "mixed_versions": float(found.mixed),
    }  # fmt: skip
    return ResultRow(
        **vars(provenance), suite=SUITE, case=f"refresh fp16 {REQUEST} of {rows} x {DIM}, host time", variant=variant,
        median_us=timing.median_us, spread=timing.spread, checks=checks,
    )  # fmt: skip
