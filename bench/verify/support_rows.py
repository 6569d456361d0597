"""Rows of the support matrix, ``bench/results/support.jsonl``: what ran on which GPU with which TensorRT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hstu_trt.bench.result_rows import RESULTS, Provenance
from hstu_trt.contract.errors import ArtefactError

SUPPORT = RESULTS / "support.jsonl"
Status = Literal["passed", "failed", "skipped"]
_WORDS: dict[Status, str] = {"passed": "yes", "failed": "**failed**", "skipped": "not run"}


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """How one step ended."""

    name: str
    status: Status
    seconds: float = 0.0
    figure: str = ""
    """What it found, for people; or why it was skipped or failed."""

    @property
    def cell(self) -> str:
        """For a table, as in ``yes (4 engines)``."""
        return _WORDS[self.status] + (f" ({self.figure})" if self.figure else "")


@dataclass(frozen=True, kw_only=True)
class SupportRow(Provenance):
    """One run of ``make verify-tensorrt``."""

    compute_capability: str
    steps: tuple[StepResult, ...]

    @property
    def passed(self) -> bool:
        return all(step.status == "passed" for step in self.steps)

    def to_json(self) -> str:
        """The row as one line."""
        return json.dumps({"suite": "support", **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, document: Any, where: str) -> SupportRow:
        """A row from parsed JSON. Raises ArtefactError, naming ``where``."""
        try:
            fields = {field.name: document[field.name] for field in dataclasses.fields(cls)}
            fields["steps"] = tuple(StepResult(**step) for step in fields["steps"])
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"{where} is no row of the support matrix ({error!r})") from None


def append_row(path: Path, row: SupportRow) -> None:
    """Adds a row to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(row.to_json() + "\n")


def read_support(path: Path) -> list[SupportRow]:
    """The rows of a file; none where there is no file. Raises ArtefactError."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            document = json.loads(line)
        except ValueError as error:
            raise ArtefactError(f"{path}:{number} is not JSON ({error})") from None
        rows.append(SupportRow.from_json(document, f"{path}:{number}"))
    return rows


def markdown(rows: Iterable[SupportRow]) -> str:
    """The rows as a Markdown table: the newest of each GPU and TensorRT, a column per step."""
    newest = {(row.device, row.versions.get("tensorrt", "")): row for row in sorted(rows, key=lambda row: row.date)}
    if not newest:
        return "No machine with TensorRT has reported yet: `make verify-tensorrt` adds a row."
    columns = list(dict.fromkeys(step.name for row in newest.values() for step in row.steps))
    header = ("GPU", "TensorRT", "driver", "date, commit", *columns)
    lines = [_line(header), "|" + "---|" * len(header)]
    return "\n".join([*lines, *(_line(_cells(row, columns)) for row in newest.values())])


def _cells(row: SupportRow, columns: Sequence[str]) -> list[str]:
    steps = {step.name: step.cell for step in row.steps}
    known = [row.versions.get(name, "?") for name in ("tensorrt", "driver")]
    cells = [steps.get(name, "-") for name in columns]
    return [f"{row.device} ({row.compute_capability})", *known, f"{row.date[:10]}, `{row.commit}`", *cells]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
