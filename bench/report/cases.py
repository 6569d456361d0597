"""Load rows as the report shows them: by deployment and workload, the newest run of each kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hstu_trt.bench.load.rows import SUITE
from hstu_trt.bench.result_rows import ResultRow
from hstu_trt.contract.errors import GateError

_OURS = "hstu-trt"
SCENARIO_ORDER = ("single", "closed", "offline", "server", "open")


@dataclass(frozen=True, kw_only=True)
class Case:
    """The rows of one deployment and workload, the newest run of each kind."""

    name: str
    rows: tuple[ResultRow, ...]
    earlier: tuple[ResultRow, ...]
    """The same runs before."""

    def of(self, scenario: str, *, client: str = _OURS) -> list[ResultRow]:
        """Rows of a scenario, sent by a client."""
        return [row for row in self.rows if row.details["scenario"] == scenario and row.details["client"] == client]


def cases_of(rows: Iterable[ResultRow]) -> list[Case]:
    """Load rows by case, in the order in which they were measured; refuses rows without checks.

    A run's rows share their date. Those of one served model, scenario and client belong together: only the newest date
    of each counts, so that a curve does not mix runs.
    """
    loads = [row for row in rows if row.suite == SUITE]
    unchecked = [f"{row.case} / {row.variant}" for row in loads if "gates_failed" not in row.checks]
    if unchecked:
        raise GateError(
            f"speed without a check of the scores is not reported: {'; '.join(unchecked[:3])}"
            f"{' and more' if len(unchecked) > 3 else ''}; measure it again with hstu-trt bench serve"
        )
    found = []
    for name in dict.fromkeys(row.case for row in loads):
        groups: dict[tuple[str, ...], list[ResultRow]] = {}
        for row in loads:
            if row.case == name:
                kind = (row.details["served"], row.details["scenario"], row.details["client"])
                groups.setdefault(kind, []).append(row)
        newest, earlier = [], []
        for group in groups.values():
            last = max(row.date for row in group)
            newest += [row for row in group if row.date == last]
            earlier += [row for row in group if row.date != last]
        newest.sort(key=_position)
        found.append(Case(name=name, rows=tuple(newest), earlier=tuple(earlier)))
    return found


def _position(row: ResultRow) -> tuple[Any, ...]:
    """By served model, client and scenario, then by the first number in the setting."""
    details = row.details
    number = re.search(r"[0-9]+(\.[0-9]+)?", row.variant.removeprefix(details["served"]))
    order = SCENARIO_ORDER.index(details["scenario"])
    return details["served"], details["client"], order, float(number.group()) if number else 0.0
