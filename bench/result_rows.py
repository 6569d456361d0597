"""Rows of measurements, ``bench/results/*.jsonl``: every performance figure in the README comes from one of them."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where and from what a row was measured."""

    device: str
    date: str
    """UTC, as in 2026-11-22T10:30:00Z."""
    commit: str
    versions: dict[str, str]

    @classmethod
    def here(cls, device: str, versions: Mapping[str, str], commit: str | None = None) -> Provenance:
        """Now, on this machine; ``commit`` where the tree is no git checkout."""
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        return cls(device=device, date=date, commit=commit or git_commit(), versions=dict(versions))


@dataclass(frozen=True, kw_only=True)
class ResultRow(Provenance):
    """One measured variant of one case. A figure that means nothing for a suite is None."""

    suite: str
    case: str
    variant: str
    median_us: float
    spread: float
    """Slowest less fastest round, as a share of the median. Suites that time single requests in one long run
    (``refresh``, ``overload``) give the third less the first quartile; 0 where there is one figure alone."""
    tflops: float | None = None
    gbps: float | None = None
    """Least bytes that the work must move, each input and output once, by the time."""
    per_s: float | None = None
    """Units of the suite per second, users for kernels."""
    ratio_to: dict[str, float] = field(default_factory=dict)
    """Reference of the same run -> how many times faster this row is."""
    checks: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    """What only rows of one suite have, load runs above all; see the module that writes them."""

    def to_json(self) -> str:
        """The row as one line, fields in the order of the design; a NaN is refused."""
        document = asdict(self)
        written = [*ROW_FIELDS, *(name for name in OPTIONAL_FIELDS if document[name])]
        return json.dumps({name: document[name] for name in written}, allow_nan=False)

    @classmethod
    def from_json(cls, document: Any, where: str) -> ResultRow:
        """A row from parsed JSON. Raises ArtefactError, naming ``where``."""
        if not isinstance(document, dict):
            raise ArtefactError(f"{where} is no JSON object")
        missing, unknown = set(ROW_FIELDS) - set(document), set(document) - {*ROW_FIELDS, *OPTIONAL_FIELDS}
        if missing or unknown:
            raise ArtefactError(f"{where}: fields missing {sorted(missing)}, fields unknown {sorted(unknown)}")
        return cls(**document)


ROW_FIELDS = (
    "suite", "case", "variant", "device", "date", "commit", "versions", "median_us", "spread", "tflops", "gbps",
    "per_s", "ratio_to", "checks",
)  # fmt: skip
OPTIONAL_FIELDS = ("details",)
"""Written where a row has them."""
assert {*ROW_FIELDS, *OPTIONAL_FIELDS} == {f.name for f in fields(ResultRow)}


def append_rows(path: Path, rows: Iterable[ResultRow]) -> None:
    """Adds rows to a file, one per line, in one write: an interrupt or a row that is refused leaves no part of them."""
    text = "".join(row.to_json() + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as stream:
        stream.write(text.encode())


def read_rows(paths: Sequence[Path]) -> list[ResultRow]:
    """The rows of the files in their order. Raises ArtefactError."""
    rows = []
    for path in paths:
        try:
            text = path.read_text()
        except OSError as error:
            raise ArtefactError(f"cannot read {path}: {error.strerror}; a benchmark's --out writes it") from None
        rows += parse_rows(text, str(path))
    return rows


def parse_rows(text: str, where: str) -> list[ResultRow]:
    """The rows of a file's text. Raises ArtefactError, naming ``where`` and the line."""
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            document = json.loads(line)
        except ValueError as error:
            raise ArtefactError(f"{where}:{number} is not JSON ({error})") from None
        rows.append(ResultRow.from_json(document, f"{where}:{number}"))
    return rows


def latest(rows: Iterable[ResultRow]) -> dict[tuple[str, str], ResultRow]:
    """(case, variant) -> its newest row; of rows with one date, the last."""
    newest: dict[tuple[str, str], ResultRow] = {}
    for row in rows:
        key = (row.case, row.variant)
        if key not in newest or row.date >= newest[key].date:
            newest[key] = row
    return newest


def sources(rows: Iterable[ResultRow]) -> list[tuple[str, str, str]]:
    """Every (device, day, commit) that rows were measured on."""
    return sorted({(row.device, row.date[:10], row.commit) for row in rows})


def sources_text(rows: Iterable[ResultRow]) -> str:
    """Where, when and at which commits rows were measured, as Markdown."""
    found = [f"{device}, {day}, commit `{commit}`" for device, day, commit in sources(rows)]
    return f"Measured on {'; '.join(found)}."


def git_commit() -> str:
    """The commit of this tree, with ``-dirty`` where more than result rows has changed, or "unknown" outside of git."""
    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/results")
    return f"{commit.strip()}{'-dirty' if changed else ''}" if commit else "unknown"


def git(*arguments: str, cwd: Path = RESULTS.parent) -> str | None:
    """What git prints in a folder of this tree; None where it fails, or there is no git or no repository."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout if answer.returncode == 0 else None


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of the installed ones among ``names``."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The CPU's name, as the kernel has it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores_text() -> str:
    """The device of rows of a CPU: its name, and the cores that this process may use."""
    return f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"


def cuda_versions() -> dict[str, str]:
    """Versions of what a measurement on a CUDA GPU rests on."""
    import torch

    found = package_versions(("torch", "triton"))
    found["cuda"] = str(torch.version.cuda)
    found["cudnn"] = str(torch.backends.cudnn.version())
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        driver = []
    return found | ({"driver": driver[0]} if driver else {})


def device_slug(device: str) -> str:
    """The short name of a GPU, for files: "NVIDIA H100 80GB HBM3" -> "h100"."""
    noise = re.compile(r"nvidia|geforce|tesla|\d+gb|hbm\w*|pcie|sxm\w*", flags=re.IGNORECASE)
    words = [word for word in re.split(r"[^A-Za-z0-9]+", device) if word and not noise.fullmatch(word)]
    return "_".join(words).lower() or "gpu"
