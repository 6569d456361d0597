"""NVIDIA's perf_analyzer: where it is, what it is told, and what its files say.

What it needs to be told (found by running 2.45 against our deployments): time windows hardly ever settle on a busy
machine, so windows count requests; requests come from a file, since its random ids lie outside every table and all have
one length; each entry of the file has the shape of one request, without the batch dim. In rate mode its latencies begin
when a request was sent, however late that was, so the rate that it reached decides whether to believe them. Its export
of single requests holds raw bytes in JSON strings, so times are read from it by pattern.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hstu_trt.bench.load.client import Records
from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.tensors import FUSED
from hstu_trt.serving.requests import one_user

DEFAULT_FOLDER = Path("build/perf_analyzer")
NAME = "perf_analyzer"
_LIBRARIES = ("libcudart", "libb64")
_REQUEST = re.compile(r'"timestamp":(\d+)')
_ANSWER = re.compile(r'"response_timestamps":\[(\d*)')
_WINDOWS = re.compile(r'"window_boundaries":\[([\d,]*)\]')
_NOT_STABLE = "Failed to obtain stable measurement"
_NOT_KEEPING_UP = "not able to keep up with the desired"
_WINDOWS_JUDGED = 3
"""perf_analyzer calls a measurement stable when so many windows in a row agree, and reports those."""


@dataclass(frozen=True, kw_only=True)
class PerfAnalyzer:
    """An installed perf_analyzer."""

    binary: Path
    libraries: Path | None = None
    """Folder of shared libraries that it needs and the system lacks."""

    def environment(self) -> dict[str, str]:
        """Variables that it runs with."""
        path = [str(self.libraries)] if self.libraries else []
        path += [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(path)}

    def version(self) -> str:
        """As in ``2.45.0``."""
        answer = subprocess.run(
            [str(self.binary), "--version"], env=self.environment(), capture_output=True, text=True, check=False
        )
        found = re.search(r"Version (\S+)", answer.stdout + answer.stderr)
        if found is None:  # it ends with code 1 even so
            raise ArtefactError(f"{self.binary} does not run: {(answer.stderr or answer.stdout).strip()[:200]}")
        return found.group(1)


def find_perf_analyzer(given: Path | None = None, folder: Path = DEFAULT_FOLDER) -> PerfAnalyzer:
    """The given binary, else the one on PATH, else the one that `make perf` unpacks. Raises ArtefactError."""
    on_path = shutil.which(NAME)
    if given is None and on_path is not None:
        return PerfAnalyzer(binary=Path(on_path))
    binaries = [given] if given else sorted(folder.glob(f"*.data/data/bin/{NAME}"))
    if not binaries or not binaries[0].is_file():
        raise ArtefactError(f"no {NAME} {given or 'on PATH'}: `make perf` unpacks one, or name it with --perf-analyzer")
    binary = binaries[0].resolve()
    binary.chmod(binary.stat().st_mode | 0o755)
    return PerfAnalyzer(binary=binary, libraries=_link_libraries(folder / "lib"))


def _link_libraries(folder: Path) -> Path | None:
    """Links the libraries that the nvidia-pytriton wheel brings under the names that the binary asks for."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        return None
    bundled = Path(next(iter(spec.submodule_search_locations))).parent / "nvidia_pytriton.libs"
    folder.mkdir(parents=True, exist_ok=True)
    for library in bundled.glob("*.so.*"):
        name, _, version = library.name.partition(".so.")
        if name.rpartition("-")[0] in _LIBRARIES:
            major = version.partition(".")[0]
            link = folder / f"{name.rpartition('-')[0]}.so.{major}"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
    return folder.resolve()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One load: a number of requests in flight, or a rate of Poisson arrivals."""

    in_flight: int | None = None
    rate: float | None = None

    def flags(self) -> list[str]:
        """As perf_analyzer's options."""
        if self.rate is not None:
            return [f"--request-rate-range={self.rate:g}:{self.rate:g}", "--request-distribution=poisson"]
        return [f"--concurrency-range={self.in_flight}:{self.in_flight}"]


@dataclass(frozen=True, kw_only=True)
class PerfRun:
    """What perf_analyzer reported for a setting."""

    records: Records
    """The requests of the windows that it judged."""
    table: Mapping[str, float]
    """Its own CSV row."""
    stable: bool
    keeps_up: bool


def write_input_data(path: Path, served: str, requests: Sequence[Tensors]) -> None:
    """Requests as perf_analyzer takes them; for ``ranking_fused`` each is a batch of one, whose dim it adds itself."""
    entries = []
    for request in requests:
        tensors = one_user(request) if served == FUSED else request
        skipped = 1 if served == FUSED else 0
        entries.append(
            {
                name: {"content": array.ravel().tolist(), "shape": list(array.shape[skipped:])}
                for name, array in tensors.items()
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"data": entries}))


def command(
    tool: PerfAnalyzer, url: str, served: str, setting: Setting, folder: Path, *, window: int, stability: float
) -> list[str]:
    """The command line. window: requests per measuring window. stability: allowed change between windows, percent."""
    return [
        str(tool.binary), "-m", served, "-i", "grpc", "-u", url, "--async",
        f"--input-data={input_file(folder, served)}", *setting.flags(),
        "--measurement-mode=count_windows", f"--measurement-request-count={window}",
        f"--stability-percentage={stability:g}", "--max-trials=6", "--percentile=99",
        "-f", str(folder / "perf.csv"), "--verbose-csv", f"--profile-export-file={folder / 'perf.json'}",
    ]  # fmt: skip


def input_file(folder: Path, served: str) -> Path:
    """Where the requests of a served model lie."""
    return folder / f"{served}.json"


def run(
    tool: PerfAnalyzer, url: str, served: str, setting: Setting, folder: Path, *, window: int, timeout_s: float
) -> PerfRun:
    """Measures a setting; if its windows do not agree within 30 %, once more without that condition, as not stable."""
    for stability in (30.0, 999.0):
        for name in ("perf.csv", "perf.json"):
            (folder / name).unlink(missing_ok=True)
        line = command(tool, url, served, setting, folder, window=window, stability=stability)
        try:
            answer = subprocess.run(
                line,
                env=tool.environment(),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise HstuTrtError(f"{NAME} took more than {timeout_s:g} s for {setting}: {' '.join(line)}") from None
        said = answer.stdout + answer.stderr
        if (folder / "perf.csv").is_file():
            return PerfRun(
                records=read_export((folder / "perf.json").read_text(errors="replace")),
                table=read_table((folder / "perf.csv").read_text()),
                stable=stability < 100,
                keeps_up=_NOT_KEEPING_UP not in said,
            )
        if _NOT_STABLE not in said:
            break
    shown = "\n  ".join(line for line in said.splitlines() if "INT64" not in line)[-1500:]
    raise HstuTrtError(f"{NAME} failed with code {answer.returncode}:\n  {shown}")


def read_table(text: str) -> dict[str, float]:
    """The row of perf_analyzer's CSV, times in microseconds; cells that are no number are left out."""
    rows = list(csv.DictReader(text.splitlines()))
    if not rows:
        raise HstuTrtError(f"{NAME} wrote a CSV without a row")
    found = {}
    for name, cell in rows[-1].items():
        try:
            found[name] = float(cell)
        except (TypeError, ValueError):
            continue
    return found


def read_export(text: str) -> Records:
    """The requests of the last windows of a profile export, in seconds."""
    sent = np.array([int(found) for found in _REQUEST.findall(text)], dtype=np.int64)
    done = np.array([int(found or 0) for found in _ANSWER.findall(text)], dtype=np.int64)
    windows = _WINDOWS.search(text)
    if not sent.size or sent.size != done.size:
        raise HstuTrtError(f"{NAME}'s export holds {sent.size} requests and {done.size} answers")
    bounds = [int(bound) for bound in windows.group(1).split(",") if bound] if windows else []
    begin = bounds[-1 - _WINDOWS_JUDGED] if len(bounds) > _WINDOWS_JUDGED else 0
    chosen = np.flatnonzero((sent >= begin) & (done <= (bounds[-1] if bounds else done.max())))
    if not chosen.size:
        raise HstuTrtError(f"{NAME}'s export holds no request of its last {_WINDOWS_JUDGED} windows")
    chosen = chosen[np.argsort(sent[chosen], kind="stable")]
    origin = int(sent[chosen[0]])
    seconds: list[Any] = [(times[chosen] - origin) / 1e9 for times in (sent, done)]
    return Records(
        due=seconds[0], sent=seconds[0], done=seconds[1], which=np.zeros(len(chosen), np.int64), errors={}, cpu_s=0.0
    )
