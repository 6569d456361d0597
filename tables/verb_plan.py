"""``tables plan``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.table_format import read_tables
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.contract.text import bytes_text, text_table
from hstu_trt.tables.host import REGENERATE
from hstu_trt.tables.plan import DTYPE_BYTES, GB, GPUS, Gpu, Machine, Placement, TableSize, cluster_bytes, place_tables
from hstu_trt.tables.popularity import Popularity
from hstu_trt.tables.terminal import DTYPES, Verbs, json_option, pairs

POPULARITIES = ("uniform", "zipf:0.8", "zipf:1.05")
_STORED_NAMES = {stored: name for name, stored in DTYPES.items()}


def add_parsers(verbs: Verbs) -> None:
    """Adds the verb's parser."""
    text = "say which tier of a machine holds each table, the expected hit rates, and the time of a request"
    one = verbs.add_parser("plan", parents=[json_option()], help=text, description=text)
    one.add_argument("folder", type=Path, nargs="?", help="a tables folder; or describe tables with --table")
    one.add_argument("--table", action="append", default=[], metavar="NAME=ROWSxDIM", help="as in item_id=1e9x512")
    one.add_argument(
        "--dtype", action="append", choices=DTYPE_BYTES, help="default: as stored and int8; else float16, int8"
    )
    one.add_argument("--gpu", choices=[*GPUS, "all"], default="h100", help="default: h100; all: side by side, in short")
    one.add_argument("--gpu-memory", type=float, metavar="GB", help="default: the GPU's")
    one.add_argument("--gpu-share", type=float, default=0.75, help="of its memory for tables (default: 0.75)")
    one.add_argument("--link", type=float, metavar="GB/s", help="host to GPU (default: what the GPU's PCIe gives)")
    one.add_argument("--host-memory", type=float, default=512.0, metavar="GB", help="for tables (default: 512)")
    one.add_argument(
        "--pin-rate", type=float, default=0.25, metavar="GB/s", help="faulting in and pinning (default: 0.25)"
    )
    one.add_argument(
        "--popularity", action="append", metavar="LAW",
        help=f"uniform, zipf:EXPONENT, or a .npy file with a count per id (default: {', '.join(POPULARITIES)})",
    )  # fmt: skip
    one.add_argument("--lookups", type=int, default=9048, help="rows per request and table (default: 9048, DLRMv3's)")
    one.add_argument("--requests-per-s", type=float, default=1450.0, help="per GPU (default: 1450)")
    one.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    for name in ("gpu_share", "host_memory", "pin_rate", "lookups", "requests_per_s"):
        if getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be > 0, got {getattr(options, name)}")
    popularities, table_sets = [Popularity(text) for text in options.popularity or POPULARITIES], _table_sets(options)
    machines = [_machine(gpu, options) for gpu in (GPUS.values() if options.gpu == "all" else [GPUS[options.gpu]])]
    plans = [
        (machine, title, place_tables(tables, machine, popularities, options.lookups))
        for machine in machines
        for title, tables in table_sets.items()
    ]
    assumptions = _assumptions(machines, options)
    if options.json:
        found = [{"gpu": m.gpu.name, "dtype": title, **_row(p, options)} for m, title, plan in plans for p in plan]
        print(json.dumps({"assumptions": assumptions, "placements": found}, indent=1))
        return 0
    if options.gpu == "all":
        _print_in_short(plans)
    for _, title, placements in plans if options.gpu != "all" else []:
        print(f"{title}:")
        _print(placements, options)
        print()
    print("Assumed, not measured:")
    print("\n".join(f"  {line}" for line in assumptions))
    return 0


def _machine(gpu: Gpu, options: argparse.Namespace) -> Machine:
    return Machine(
        gpu=replace(gpu, memory=_or(options.gpu_memory, gpu.memory), link=_or(options.link, gpu.link)),
        gpu_share=options.gpu_share,
        host_memory=options.host_memory * GB,
        pin_rate=options.pin_rate * GB,
    )


def _print_in_short(plans: Sequence[tuple[Machine, str, list[Placement]]]) -> None:
    laws = list(plans[0][2][0].hit_rates) if plans and plans[0][2] else []
    cells = [
        [
            machine.gpu.name, title, p.table.name, p.tier, bytes_text(p.gpu_bytes), bytes_text(p.pinned_bytes),
            *(f"{p.hit_rates[law]:.1%}" for law in laws),
        ]
        for machine, title, placements in plans
        for p in placements
    ]  # fmt: skip
    print(
        text_table(["GPU", "dtype", "table", "tier", "on the GPU", "on the host", *(f"hits {n}" for n in laws)], cells)
    )
    print()


def _or(given: float | None, usual: float) -> float:
    if given is not None and given <= 0:
        raise ConfigError(f"--gpu-memory and --link must be > 0, got {given}")
    return usual if given is None else given * GB


def _table_sets(options: argparse.Namespace) -> dict[str, list[TableSize]]:
    """Title -> the tables in one choice of dtypes."""
    described = [_described(name, text) for name, text in pairs("--table", options.table).items()]
    if (options.folder is None) == (not described):
        raise ConfigError("give a tables folder, or tables with --table NAME=ROWSxDIM")
    sets: dict[str, list[TableSize]] = {}
    if options.folder is not None:
        folder = current_tables(options.folder)
        stored = read_tables(folder, regenerate=REGENERATE.format(folder=folder))
        described = [
            TableSize(name=t.name, rows=t.rows, dim=t.dim, dtype=_STORED_NAMES[t.dtype])
            for t in stored.values()
            if t.rows
        ]
        if not options.dtype:
            sets["as stored"] = described
    usual = ("int8",) if options.folder is not None else ("float16", "int8")
    return sets | {dtype: [replace(table, dtype=dtype) for table in described] for dtype in options.dtype or usual}


def _described(name: str, text: str) -> TableSize:
    rows, _, dim = text.partition("x")
    try:
        return TableSize(name=name, rows=int(float(rows)), dim=int(dim), dtype="float16")
    except (ValueError, OverflowError):
        raise ConfigError(f"--table {name}={text}: expected ROWSxDIM, as in 1e9x512") from None


def _assumptions(machines: Sequence[Machine], options: argparse.Namespace) -> list[str]:
    machine = machines[0]
    return [
        *(
            f"{gpu.name}: {gpu.memory / GB:.0f} GB, {machine.gpu_share:.0%} of it for tables, {gpu.bandwidth / GB:.0f} "
            f"GB/s (data sheet), {gpu.link / GB:.0f} GB/s from the host"
            for gpu in (one.gpu for one in machines)
        ),
        f"host: {machine.host_memory / GB:.0f} GB for tables, pinned at {machine.pin_rate / GB:g} GB/s: where one "
        "thread faults the pages in, 300 GB took tens of minutes; faulting them in by many threads first is faster",
        f"a request looks up {options.lookups} rows of each table, gets fp16; {options.requests_per_s:g} requests/s",
        "the hottest rows lie on the GPU (rank order); under uniform lookups, as in DLRMv3, hits are their share",
        "hits and misses are read one after the other; transfers only, no launch, no queueing",
        "in a cluster: Redis 7 with jemalloc, hashes as `tables push` makes them, no replicas (each is the same again)",
    ]


def _row(placement: Placement, options: argparse.Namespace) -> dict[str, Any]:
    table = placement.table
    return {
        "table": table.name,
        "rows": table.rows,
        "dim": table.dim,
        "stored": table.dtype,
        "bytes": table.payload_bytes,
        "cluster_bytes": cluster_bytes(table),
        "tier": placement.tier,
        "gpu_bytes": placement.gpu_bytes,
        "pinned_bytes": placement.pinned_bytes,
        "pin_seconds": placement.pin_seconds,
        "hit_rates": placement.hit_rates,
        "request_us": placement.request_us,
        "link_bytes_per_s": {text: size * options.requests_per_s for text, size in placement.link_bytes.items()},
    }


def _print(placements: list[Placement], options: argparse.Namespace) -> None:
    cells = []
    for placement in placements:
        row = _row(placement, options)
        for text, hit in placement.hit_rates.items():
            time, rate = placement.request_us.get(text), row["link_bytes_per_s"].get(text)
            cells.append(
                [
                    row["table"], bytes_text(row["bytes"]), row["tier"], bytes_text(row["gpu_bytes"]),
                    _duration(row["pin_seconds"]), text, f"{hit:.1%}", "-" if time is None else f"{time:.0f}",
                    "-" if rate is None else f"{rate / GB:.1f}", bytes_text(row["cluster_bytes"]),
                ]
            )  # fmt: skip
    header = [
        "table",
        "size",
        "tier",
        "on the GPU",
        "pinning",
        "popularity",
        "hits",
        "us/request",
        "link GB/s",
        "in a cluster",
    ]
    print(text_table(header, cells))


def _duration(seconds: float) -> str:
    return "-" if not seconds else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
