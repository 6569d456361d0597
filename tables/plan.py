"""Which tier of which machine holds a table, how often the GPU's own memory answers, and what that costs in time.

A model of transfers, no measurement: bytes by bandwidths. Its assumptions are data (``Machine``) and printed with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hstu_trt.contract.errors import ConfigError
from hstu_trt.tables.popularity import Popularity

GB = 1e9
DTYPE_BYTES = {"float32": 4, "float16": 2, "int8": 1, "fp8": 1}
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and its link to the host. Memory and bandwidth by its data sheet."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second of its own memory."""
    link: float
    """Bytes per second from pinned host memory, as practice gives: 55 GB/s of PCIe 5.0 x16, 25 of 4.0."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(name="h100", memory=80 * GB, bandwidth=3350 * GB, link=55 * GB),
        Gpu(name="h200", memory=141 * GB, bandwidth=4800 * GB, link=55 * GB),
        Gpu(name="a100", memory=80 * GB, bandwidth=2039 * GB, link=25 * GB),
        Gpu(name="l40s", memory=48 * GB, bandwidth=864 * GB, link=25 * GB),
        Gpu(name="l4", memory=24 * GB, bandwidth=300 * GB, link=12 * GB),
    )
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a table has to fit into."""

    gpu: Gpu
    gpu_share: float
    """Share of the GPU's memory that tables may take; the rest is for weights, activations and caches."""
    host_memory: float
    """Bytes that tables may take on the host."""
    pin_rate: float
    """Bytes per second at which pages are faulted in and pinned."""


@dataclass(frozen=True, kw_only=True)
class TableSize:
    """A table as it would be stored."""

    name: str
    rows: int
    dim: int
    dtype: str

    def __post_init__(self) -> None:
        if self.rows < 1 or self.dim < 1:
            raise ConfigError(f"table {self.name!r}: rows and dim must be >= 1, got {self.rows} and {self.dim}")

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, without its scale."""
        return self.dim * DTYPE_BYTES[self.dtype]

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales."""
        return self.rows * SCALE_BYTES if DTYPE_BYTES[self.dtype] == 1 else 0

    @property
    def payload_bytes(self) -> int:
        """Bytes of all rows and scales."""
        return self.rows * self.row_bytes + self.scale_bytes


# A field of a hash in Redis 7, beside its value: entry, bucket, and the row's number as a string. Measured with values
# of 128, 516 and 1,024 bytes: 59 to 60.
_FIELD_BYTES = 60


def cluster_bytes(table: TableSize) -> int:
    """Bytes of a table in a Redis Cluster, without replicas: values in the allocator's size classes, and their fields.

    jemalloc has four classes per doubling; a string has a header of 3 bytes below 256 bytes, of 5 from there on, and
    ends with a zero.
    """
    value = table.row_bytes + (SCALE_BYTES if table.scale_bytes else 0)
    needed = value + (4 if value < 256 else 6)
    step = max(16, 1 << max(0, (needed - 1).bit_length() - 3))
    return table.rows * (-(-needed // step) * step + _FIELD_BYTES)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a table goes, and how a request of some lookups fares."""

    table: TableSize
    tier: str
    """``gpu``: all of it. ``hot set``: the hottest rows on the GPU in front of pinned host memory. ``host``: pinned
    host memory alone. ``disk``: mapped files, read by the CPU."""
    gpu_rows: int
    pinned_bytes: int
    pin_seconds: float
    hit_rates: dict[str, float]
    """Popularity -> share of lookups that GPU memory answers."""
    link_bytes: dict[str, float]
    """Popularity -> bytes of one request over the link; empty on disk."""
    request_us: dict[str, float]
    """Popularity -> microseconds of one request: misses over the link, hits and output through GPU memory."""

    @property
    def gpu_bytes(self) -> int:
        """GPU memory that it takes: scales lie there with the first row."""
        return self.gpu_rows * self.table.row_bytes + (self.table.scale_bytes if self.gpu_rows else 0)


def place_tables(
    tables: Sequence[TableSize], machine: Machine, popularities: Sequence[Popularity], lookups: int
) -> list[Placement]:
    """Places tables, the smallest first; ``lookups``: rows that one request takes from each."""
    gpu_free, host_free = machine.gpu.memory * machine.gpu_share, machine.host_memory
    placements = []
    for table in sorted(tables, key=lambda table: table.payload_bytes):
        tier, gpu_rows = _tier(table, gpu_free, host_free)
        placement = _placement(table, tier, gpu_rows, machine, popularities, lookups)
        gpu_free -= placement.gpu_bytes
        host_free -= placement.pinned_bytes
        placements.append(placement)
    return placements


def _tier(table: TableSize, gpu_free: float, host_free: float) -> tuple[str, int]:
    """The tier, and the rows that lie in GPU memory."""
    if table.payload_bytes <= gpu_free:
        return "gpu", table.rows
    if table.payload_bytes > host_free:
        return "disk", 0
    hot = max(0, int((gpu_free - table.scale_bytes) // table.row_bytes))
    return ("hot set" if hot else "host"), hot


def _placement(
    table: TableSize, tier: str, gpu_rows: int, machine: Machine, popularities: Sequence[Popularity], lookups: int
) -> Placement:
    hits = {p.text: p.hit_rate(gpu_rows, table.rows) for p in popularities}
    on_link = {} if tier == "disk" else {text: (1 - hit) * lookups * table.row_bytes for text, hit in hits.items()}
    # Every row is read once and written once as fp16; what is not read over the link is read from GPU memory.
    moved = lookups * (table.row_bytes + 2 * table.dim)
    gpu, pinned = machine.gpu, table.payload_bytes if tier in ("hot set", "host") else 0
    times = {text: 1e6 * (size / gpu.link + (moved - size) / gpu.bandwidth) for text, size in on_link.items()}
    return Placement(
        table=table,
        tier=tier,
        gpu_rows=gpu_rows,
        pinned_bytes=pinned,
        pin_seconds=pinned / machine.pin_rate,
        hit_rates=hits,
        link_bytes=on_link,
        request_us=times,
    )
