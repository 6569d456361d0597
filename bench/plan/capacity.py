"""Arithmetic of a capacity plan: machines, memory, network and cost. What was not measured is an assumption."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hstu_trt.contract.errors import ConfigError
from hstu_trt.tables.popularity import zipf_share

GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What is to be served."""

    per_s: float
    """Requests per second at the peak."""
    table_bytes: float
    ids_per_request: float
    row_bytes: float
    zipf: float
    """Exponent of the ids' popularity; 0: uniform."""

    def __post_init__(self) -> None:
        if min(self.per_s, self.table_bytes, self.ids_per_request, self.row_bytes) <= 0 or self.zipf < 0:
            raise ConfigError(f"a demand needs positive rate, table, ids and row bytes, got {self}")


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What it is served with."""

    per_gpu: float
    """Requests per second of one accelerator within the bound."""
    headroom: float
    """Share kept free, for failures and peaks within a second."""
    gpus_per_host: int
    gpu_gib: float
    """Memory of one accelerator that tables may take."""
    host_gib: float
    """Memory of one host that tables may take."""
    copies: int = 2
    """Of each row, where the table is spread over the hosts."""
    gpu_hour: float | None = None
    host_hour: float | None = None
    """Prices; None: no cost is computed."""

    def __post_init__(self) -> None:
        if (
            self.per_gpu <= 0
            or not 0 <= self.headroom < 1
            or min(self.gpus_per_host, self.copies) < 1
            or self.host_gib <= 0
        ):
            raise ConfigError(f"a fleet needs a rate per GPU > 0, a headroom in [0, 1) and hosts, got {self}")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the table lies, and what follows from it."""

    name: str
    hosts: int
    gpus: int
    host_gib: float
    """Memory of the table per host."""
    hit_share: float
    """Share of the lookups that stay on the accelerator."""
    bus_gb_s: float
    """Rows that each accelerator fetches from its host, GB/s."""
    network_gb_s: float
    """Rows that come from other hosts, per host, GB/s."""
    per_hour: float | None

    @property
    def text(self) -> str:
        """The placement in a line."""
        cost = "" if self.per_hour is None else f", {self.per_hour:,.0f} per hour"
        return (
            f"{self.gpus:,} GPUs in {self.hosts:,} hosts, {self.host_gib:,.0f} GiB of table per host, "
            f"{self.hit_share:.0%} of lookups on the GPU, {self.bus_gb_s:.2f} GB/s from the host to each GPU, "
            f"{self.network_gb_s:.2f} GB/s to each host from the others{cost}"
        )


def placements(demand: Demand, fleet: Fleet) -> list[Placement]:
    """The ways to hold the table that are possible, cheapest first; whole on each GPU, whole in each host, spread."""
    needed = max(1, math.ceil(demand.per_s / (fleet.per_gpu * (1 - fleet.headroom))))
    hosts = math.ceil(needed / fleet.gpus_per_host)
    table_gib = demand.table_bytes / GIB
    found = []
    if table_gib <= fleet.gpu_gib:
        found.append(_placement("whole on each GPU", demand, fleet, hosts, 0.0))
    if table_gib <= fleet.host_gib:
        found.append(_placement("whole in each host's memory", demand, fleet, hosts, table_gib))
    spread = max(hosts, math.ceil(fleet.copies * table_gib / fleet.host_gib))
    found.append(_placement("spread over all hosts", demand, fleet, spread, fleet.copies * table_gib / spread))
    return sorted(found, key=lambda one: (one.per_hour or one.gpus, one.network_gb_s))


def _placement(name: str, demand: Demand, fleet: Fleet, hosts: int, host_gib: float) -> Placement:
    rows = demand.table_bytes / demand.row_bytes
    kept = min(rows, fleet.gpu_gib * GIB / demand.row_bytes)
    hit = zipf_share(int(kept), int(rows), demand.zipf)
    gpus = hosts * fleet.gpus_per_host
    missed = demand.per_s * demand.ids_per_request * (1 - hit) * demand.row_bytes / hosts
    # Copies are spread evenly, so the chance that a row lies here is copies / hosts.
    remote = missed * max(0.0, 1 - fleet.copies / hosts) if name.startswith("spread") else 0.0
    cost = None
    if fleet.gpu_hour is not None:
        cost = gpus * fleet.gpu_hour + hosts * (fleet.host_hour or 0.0)
    return Placement(
        name=name,
        hosts=hosts,
        gpus=gpus,
        host_gib=host_gib,
        hit_share=hit,
        bus_gb_s=missed / fleet.gpus_per_host / 1e9,
        network_gb_s=remote / 1e9,
        per_hour=cost,
    )
