"""``hstu-trt bench remote``: rows per second from a Redis Cluster, beside redis-py on the same rows in the same run.

All contenders read the same layout (a hash per partition) into one array [rows, dim], and every row of every lookup is
compared with the source. They take turns, each round begins with another one: what else the machine does falls on all
of them, and so do rows that nobody has asked for before.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.arguments import count, positive, suite_parser
from hstu_trt.bench.result_rows import RESULTS, Provenance, ResultRow, append_rows, cores_text, package_versions
from hstu_trt.bench.tables.local_cluster import LocalCluster, local_cluster
from hstu_trt.bench.timing import Timing
from hstu_trt.bench.workloads.popularity import draw_items
from hstu_trt.contract.errors import ConfigError, GateError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.contract.text import text_table
from hstu_trt.tables.host import LookupOptions
from hstu_trt.tables.remote import RemoteTables
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_layout import RemoteVersion
from hstu_trt.tables.remote_push import Push

Lookup = Callable[[NDArray], NDArray]
"""int64 ids [n] -> float16 rows [n, dim]."""

OURS = "hstu-trt"
PIPELINE = "redis-py pipeline"
GROUPED = "redis-py HMGET by partition"
TABLE = "bench_items"
DIM = 512


@dataclass(frozen=True, kw_only=True)
class Case:
    """A request: how many ids, and how they are drawn."""

    ids: int
    exponent: float
    """Of Zipf's law; 0: uniform."""

    @property
    def name(self) -> str:
        return f"{self.ids} ids, {f'zipf {self.exponent:g}' if self.exponent else 'uniform'}, {DIM} x fp16"


# A request of DLRMv3 looks up 9,048 items: 7,000 of history and 2,048 candidates.
CASES = (Case(ids=9048, exponent=0.0), Case(ids=9048, exponent=1.05), Case(ids=512, exponent=0.0))


def main(argv: Sequence[str]) -> int:
    """Runs the suite; rows go to ``--out``."""
    parser = suite_parser("remote", __doc__)
    parser.add_argument("--rows", type=count, default=100_000, help="rows of the table (default: 100000)")
    parser.add_argument("--rounds", type=count, default=30, help="timed lookups of each contender (default: 30)")
    parser.add_argument("--least-ratio", type=positive, help="exit code 1 if we are not this many times faster than "
                        f"{PIPELINE} at the first case")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS / "remote_cpu.jsonl", help="file that rows are added to")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, local_cluster(Path(folder) / "cluster") as servers:
        rows = measure(servers, Path(folder), args.rows, args.rounds)
    append_rows(args.out, rows)
    print(_report(rows))
    print(f"wrote {len(rows)} rows to {args.out}")
    ratio = next(row.ratio_to[PIPELINE] for row in rows if row.variant == OURS)
    if args.least_ratio is not None and ratio < args.least_ratio:
        raise GateError(f"{ratio:.1f} times as fast as {PIPELINE}, at least {args.least_ratio:g} times wanted")
    return 0


def measure(servers: LocalCluster, folder: Path, table_rows: int, rounds: int) -> list[ResultRow]:
    """Rows of all cases, from a table that is made in ``folder`` and pushed. Raises GateError for a wrong row."""
    values = np.random.default_rng(0).normal(size=(table_rows, DIM)).astype(np.float16)
    config = TableConfig(name=TABLE, rows=table_rows, dim=DIM, dtype="float16", features=("item",))
    write_tables_manifest(folder / "tables", [write_table(folder / "tables", config, [values])], "bench", {})
    with Cluster(ClusterOptions(nodes=servers.names)) as cluster:
        Push(cluster, folder / "tables", TABLE, "v1").run()
        tables = RemoteTables(cluster, [TABLE], versions={TABLE: "v1"}, deadline_ms=10_000)
        host, port = servers.names[0].split(":")
        contenders = {OURS: _ours(tables), **_redis_py(host, int(port), tables.tables[TABLE])}
        server = str(servers.nodes[0].command("INFO", "server"))
        # Valkey tells both: the Redis that it is compatible with, and its own.
        kind = "valkey" if "valkey_version:" in server else "redis"
        version = server.partition(f"{kind}_version:")[2].partition("\\r")[0]
        packages = package_versions(("redis", "hiredis", "numpy"))
        found = Provenance.here(cores_text(), {**packages, f"{kind}-server": version})
        return [row for case in CASES for row in _case_rows(case, contenders, values, rounds, found)]


def _ours(tables: RemoteTables) -> Lookup:
    options = LookupOptions(dtype="float16")
    return lambda ids: tables.lookup(TABLE, ids, options)[0]


def _redis_py(host: str, port: int, version: RemoteVersion) -> dict[str, Lookup]:
    """redis-py's two ways: a command per row, and rows grouped by partition before they come to redis-py."""
    try:
        from redis.cluster import RedisCluster
    except ModuleNotFoundError:
        raise ConfigError("redis-py is missing: pip install 'hstu-trt[redis]'") from None
    client: Any = RedisCluster(host=host, port=port)
    keys = [version.partition_key(partition) for partition in range(version.partitions)]

    def to_rows(values: Sequence[bytes]) -> NDArray:
        return np.frombuffer(b"".join(values), np.float16).reshape(len(values), DIM)

    def pipeline(ids: NDArray) -> NDArray:
        commands = client.pipeline()
        for partition, field in zip(partitions_of(ids, version.partitions).tolist(), _fields(ids), strict=True):
            commands.hget(keys[partition], field)
        return to_rows(commands.execute())

    def grouped(ids: NDArray) -> NDArray:
        partitions = partitions_of(ids, version.partitions)
        order = np.argsort(partitions, kind="stable")
        used, starts = np.unique(partitions[order], return_index=True)
        fields = _fields(ids[order])
        commands = client.pipeline()
        for partition, start, end in zip(used.tolist(), starts, [*starts[1:], len(ids)], strict=True):
            commands.hmget(keys[partition], fields[start:end])
        rows = np.empty((len(ids), DIM), np.float16)
        rows[order] = to_rows([value for part in commands.execute() for value in part])
        return rows

    return {PIPELINE: pipeline, GROUPED: grouped}


def _fields(ids: NDArray) -> list[bytes]:
    data = ids.astype("<i8").tobytes()
    return [data[at : at + 8] for at in range(0, len(data), 8)]


def partitions_of(ids: NDArray, partitions: int) -> NDArray:
    """Partition of each row: splitmix64 of its number, as ``tables/remote_layout.py`` says."""
    z = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) & np.uint64(partitions - 1)).astype(np.int64)


def _case_rows(
    case: Case, contenders: dict[str, Lookup], values: NDArray, rounds: int, found: Provenance
) -> list[ResultRow]:
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    # The first round warms up: connections, maps of slots, memory.
    for round_number in range(rounds + 1):
        ids = draw_items(rng, case.ids, rows=len(values), exponent=case.exponent)
        first = round_number % len(contenders)
        for name, lookup in [*contenders.items()][first:] + [*contenders.items()][:first]:
            started = time.perf_counter()
            rows = lookup(ids)
            taken_us = (time.perf_counter() - started) * 1e6
            if rows.shape != (case.ids, DIM) or not np.array_equal(rows.view(np.uint16), values[ids].view(np.uint16)):
                raise GateError(f"{name} gave other rows than the table holds, at {case.name}")
            if round_number:
                times[name].append(taken_us)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        ResultRow(
            **vars(found),
            suite="remote",
            case=case.name,
            variant=name,
            median_us=timing.median_us,
            spread=timing.spread,
            gbps=case.ids * values[0].nbytes / timing.median_us / 1e3,
            per_s=case.ids / timing.median_us * 1e6,
            ratio_to={other: medians[other] / timing.median_us for other in times if other != name},
            checks={"wrong_rows": 0, "rounds": rounds, "slowest_us": max(times[name])},
        )
        for name, timing in ((name, Timing.of(taken)) for name, taken in times.items())
    ]


def _report(rows: Sequence[ResultRow]) -> str:
    cells = []
    for row in rows:
        ratio = row.ratio_to.get(PIPELINE, 1.0)
        cells.append([row.case, row.variant, f"{row.median_us / 1e3:.2f}", f"{row.per_s or 0:,.0f}", f"{ratio:.1f}"])
    return text_table(["case", "client", "ms", "rows/s", f"x {PIPELINE}"], cells)
