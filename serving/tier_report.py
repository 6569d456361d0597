"""Where the tables of a deployment are, what memory they take, and whether the machine and the cluster have it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.contract.tensors import ENSEMBLE
from hstu_trt.contract.text import bytes_text, text_table
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.served import lookups_of, models_of
from hstu_trt.tables.memory import available_memory
from hstu_trt.tables.tier_settings import TableTier
from hstu_trt.tables.tiers import Tiers


def _processes(deployment: Deployment) -> int:
    """Processes that look rows up; each reads resident tables into memory of its own."""
    return len(lookups_of(deployment.served))


@dataclass(frozen=True, kw_only=True)
class PlacedTable:
    """One table of a deployment."""

    table: str
    rows: int
    dim: int
    dtype: str
    bytes: int
    """Of all rows and scales."""
    tier: str
    memory: int
    """Bytes that its rows take in memory, in all processes."""
    detail: str
    """The tier's settings, for people."""


def placed_tables(deployment: Deployment) -> list[PlacedTable]:
    """The tables by their names. Raises ArtefactError, or ConfigError for settings of tables that are not there."""
    found = Tiers(deployment.tiers).read_folder(current_tables(deployment.model.tables))
    placed, processes = [], _processes(deployment)
    for name, table in sorted(found.tables.items()):
        tier = deployment.tiers.of(name)
        memory = table.payload_bytes * processes if tier.tier == "resident" else 0
        placed.append(
            PlacedTable(
                table=name, rows=table.rows, dim=table.dim, dtype=table.dtype, bytes=table.payload_bytes,
                tier=tier.tier, memory=memory, detail=_detail(tier, processes),
            )
        )  # fmt: skip
    return placed


def _detail(tier: TableTier, processes: int) -> str:
    if tier.tier == "mapped":
        return "files, in the page cache as far as memory goes"
    if tier.remote is None:
        return f"huge pages, once in each of {processes} processes" if processes > 1 else "huge pages, in one process"
    remote = tier.remote
    lacking = {"fail": "fails the request", "default": "default row"}[remote.on_failure]
    beyond = "local copy, mapped" if remote.local_copy else lacking
    return f"{', '.join(remote.nodes)}; {remote.deadline_ms:g} ms per request, then {beyond}"


def check_tiers(deployment: Deployment, *, hash_tables: bool = False, connect: bool = True) -> None:
    """Whether the rows are where the settings say, and the memory for them.

    hash_tables: re-hashes all files. connect: asks the clusters for the versions that hold these rows; one that is out
    of reach is an error where rows are nowhere else, and always with hash_tables, which looks at everything.
    Raises ArtefactError, ConfigError or RemoteError.
    """
    tiers = Tiers(deployment.tiers)
    found = tiers.read_folder(current_tables(deployment.model.tables), verify=hash_tables)
    processes = _processes(deployment)
    needed, available = processes * tiers.memory_of(found), available_memory()
    if needed > available:
        largest = max(placed_tables(deployment), key=lambda placed: placed.memory)
        raise ConfigError(
            f"resident tables take {bytes_text(needed)} in {processes} process{'es' * (processes > 1)}, "
            f"{bytes_text(available)} of memory are available; "
            f"make {largest.table!r} ({bytes_text(largest.memory)}) mapped or remote in tables.json, "
            "or smaller with: hstu-trt tables quantise"
        )
    try:
        if connect:
            tiers.remote_versions(found, need_all=hash_tables)
    finally:
        tiers.close()


def tables_text(placed: list[PlacedTable]) -> str:
    """The tables and their memory, for people."""
    header = ["table", "rows", "dim", "dtype", "size", "tier", "memory", ""]
    cells = [
        [p.table, f"{p.rows:,}", p.dim, p.dtype, bytes_text(p.bytes), p.tier, bytes_text(p.memory), p.detail]
        for p in placed
    ]
    needed = sum(p.memory for p in placed)
    return (
        f"{text_table(header, cells)}\n"
        f"memory for rows: {bytes_text(needed)} of {bytes_text(available_memory())} available"
    )


def tables_json(placed: list[PlacedTable]) -> list[dict[str, Any]]:
    """The same as JSON."""
    return [asdict(table) for table in placed]


def memory_note(deployment: Deployment) -> str:
    """What the choice of ``--served`` takes of memory, as far as files tell, for people."""
    lookups, placed = lookups_of(deployment.served), placed_tables(deployment)
    where = " and in ".join(lookups)
    if deployment.flavour == "cuda":
        size, runs = sum(table.bytes for table in placed), _steps(deployment)
        total = f", {bytes_text(size * len(lookups))} in all" if len(lookups) > 1 else ""
        return (
            f"{bytes_text(size)} of tables on the GPU in {where}{total}; a CUDA context for each of {', '.join(runs)}"
        )
    mapped = sum(table.bytes for table in placed if table.tier == "mapped")
    resident = sum(table.memory for table in placed)
    parts = [f"{bytes_text(mapped)} of mapped tables in the page cache"] if mapped or not resident else []
    parts += [f"{bytes_text(resident)} of rows in memory, of {where}"] if resident else []
    return "; ".join(parts)


def _steps(deployment: Deployment) -> tuple[str, ...]:
    """The models that compute; an ensemble has no process."""
    return tuple(name for name in models_of(deployment.served) if name != ENSEMBLE)
