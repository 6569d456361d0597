"""The ids of a request's features on their way to rows of a cluster, and what is said about those that lead nowhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from hstu_trt.tables.host import LookupOptions
from hstu_trt.tables.ids import RowStatus, range_text, resolve_ids
from hstu_trt.tables.remote_cluster import REFUSED, UNAVAILABLE, RemoteRows, RowsJob
from hstu_trt.tables.remote_layout import RemoteVersion


@dataclass
class Column:
    """The ids of one feature, on their way to rows."""

    version: RemoteVersion
    ids: NDArray
    out: NDArray
    status: NDArray
    resolved: NDArray
    """Status of each id before any row is asked for."""
    options: LookupOptions
    rejected: int | None
    bad: int
    job: RowsJob
    feature: str | None = None
    number: int = 0
    """Its place among the request's features, for messages."""


def make_column(
    rows: RemoteRows,
    version: RemoteVersion,
    ids: NDArray,
    out: NDArray,
    status: NDArray,
    options: LookupOptions,
) -> Column:
    """Ids ``[n]`` of one feature, their rows to be written to ``out [n, dim]`` and ``status [n]``."""
    found = resolve_ids(ids, version.ids, version.rows, None, options.policy, options.padding_id)
    values = out if version.dtype == options.dtype else np.empty((len(ids), version.value_bytes), np.uint8)
    numbers = np.ascontiguousarray(found.rows)
    if options.policy == "row0" and version.row0:
        numbers = np.where(found.status == RowStatus.BAD_ID, version.row0, numbers)
    job = RowsJob(table=rows, rows=numbers, values=values, status=status)
    return Column(version, ids, out, status, found.status, options, found.rejected, found.bad, job)


def bad_id_text(column: Column) -> str:
    """What is wrong with the first id that the policy rejects."""
    place = column.rejected or 0
    feature, at = "", f"{place}"
    if column.feature is not None:
        feature, at = f" (feature {column.feature!r})", f"{place}, {column.number}"
    about = range_text(column.version.table, column.version.rows)
    return f"tensor {column.options.what!r}{feature} holds {column.ids[place]} at [{at}]; {about}"


def lacking_text(column: Column, lacking: NDArray) -> str:
    """Which rows the cluster did not give. lacking: their places."""
    version, status = column.version, column.status[lacking]
    counts = {
        "unavailable": int((status == UNAVAILABLE).sum()),
        "missing": int((status == cast(int, RowStatus.MISSING)).sum()),
        "refused for their length or type": int((status == REFUSED).sum()),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return (
        f"table {version.table!r}, version {version.version!r}: of {len(column.ids)} rows {told}, "
        f"the first of them row {column.job.rows[lacking[0]]}"
    )
