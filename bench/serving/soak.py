"""``hstu-trt bench soak``: a served deployment under moderate load for long, its tables replaced now and then.

Fails (exit code 1) if the server, its model processes or ``hstu-trt serve`` above them hold more and more memory,
handles, threads or shared memory, or if a request fails.

Growth is a slope: Theil and Sen's estimator, the median of the slopes between all pairs of samples, which a quarter of
outliers does not move. The first quarter is warm-up: allocators and Triton's shared memory fill then. A slope
that would add more than ``LIMITS`` by the end fails. The limits are what noise makes, so they do not grow with the run:
at 40 requests per second, 8 MiB is 1.5 kB a request in three minutes, and 150 bytes in half an hour.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.arguments import count, positive, suite_parser
from hstu_trt.bench.load.client import OpenLoop, poisson
from hstu_trt.bench.load.process_watch import Usage, UsageWatch
from hstu_trt.bench.load.processes import Clients
from hstu_trt.bench.load.provenance import provenance_here
from hstu_trt.bench.load.target import TritonAddress
from hstu_trt.bench.result_rows import RESULTS, ResultRow, append_rows
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import generate_requests
from hstu_trt.contract.errors import ConfigError, HstuTrtError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.table_versions import publish_version
from hstu_trt.contract.text import text_table
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.served import SERVED, parse_served

SUITE = "soak"
GATE_EXIT_CODE = 1
_AGAIN = "hstu-trt bench soak"
_WARM_UP = 0.25
_MIB = 1 << 20
_TURNS = 30
"""Samples, refreshes and turns of load scale with the run."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How much a figure may grow over the part of the run that counts."""

    share: float
    """Of its median."""
    floor: float
    """What noise makes in any run."""


LIMITS = {
    # Arenas of glibc and pools of gRPC and ONNX Runtime reach their size late, in steps of some MiB.
    "memory_bytes": Limit(share=0.03, floor=8 * _MIB),
    # A connection, a file of tables that a refresh opens, and a look by the watcher at the wrong moment.
    "handles": Limit(share=0.0, floor=8),
    "threads": Limit(share=0.0, floor=4),
    # Triton's Python backend grows its regions by a MiB, and never shrinks them.
    "shared_bytes": Limit(share=0.0, floor=2 * _MIB),
    "processes": Limit(share=0.0, floor=0.5),
    # Graphs of sizes of batches that are met late, and PyTorch's reserve for them.
    "gpu_bytes": Limit(share=0.01, floor=64 * _MIB),
}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What became of a figure over the part of the run that counts."""

    name: str
    median: float
    growth: float
    """Slope by duration: how much more there is at the end."""
    allowed: float

    @property
    def is_leak(self) -> bool:
        return self.growth > self.allowed


def growth_of(name: str, seconds: NDArray, values: NDArray) -> Growth:
    """The trend of a figure. seconds, values: float64 [samples], without the warm-up."""
    from scipy.stats import theilslopes

    limit, median = LIMITS[name], float(np.median(values))
    slope = float(theilslopes(values, seconds).slope)
    growth = slope * float(seconds[-1] - seconds[0])
    return Growth(name=name, median=median, growth=growth, allowed=max(limit.floor, limit.share * median))


def trends(samples: Sequence[tuple[float, Usage]]) -> list[Growth]:
    """The trend of each figure after the warm-up. Raises HstuTrtError for too few samples."""
    counted = [sample for sample in samples if sample[0] >= _WARM_UP * samples[-1][0]]
    if len(counted) < 10:
        raise HstuTrtError(f"{len(counted)} samples say nothing about a trend: let the run take longer")
    seconds = np.array([moment for moment, _ in counted])
    columns = {name: np.array([float(getattr(usage, name)) for _, usage in counted]) for name in LIMITS}
    return [growth_of(name, seconds, values) for name, values in columns.items()]


@dataclass(frozen=True, kw_only=True)
class Soaked:
    """What a run showed."""

    seconds: float
    requests: int
    shed: int
    failed: dict[str, int]
    refreshes: int
    growths: list[Growth]

    def missed(self) -> list[str]:
        """A sentence for each promise that was not kept."""
        leaks = [
            f"{g.name} grew by {g.growth:.4g} over a median of {g.median:.4g}, {g.allowed:.4g} is allowed"
            for g in self.growths
            if g.is_leak
        ]
        return leaks + [f"{count} requests failed: {text}" for text, count in self.failed.items()]


@contextmanager
def served(deployment: Path) -> Iterator[dict[str, Any]]:
    """``hstu-trt serve`` on a deployment as a child, as users run it; what it says of itself."""
    command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(deployment)]
    with subprocess.Popen([*command, "--grpc-port", "0", "--json"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise HstuTrtError("hstu-trt serve did not start; see above")
        try:
            yield {**json.loads(line), "serve_pid": process.pid}
        finally:
            process.terminate()
            process.wait(60)


def publish_again(root: Path, model: ModelFolder, number: int) -> None:
    """Publishes the model's tables once more under a name of its own, and removes all but the last few."""
    shutil.copytree(model.tables, root / f"v{number}")
    publish_version(root / f"v{number}", regenerate=_AGAIN)
    shutil.rmtree(root / f"v{number - 3}", ignore_errors=True)


def soak(
    model: ModelFolder, folder: Path, seconds: float, rate: float, served_models: tuple[str, ...] = SERVED
) -> Soaked:
    """Serves a model in ``folder`` and sends ``rate`` requests per second, to the served models in turn."""
    versions = folder / "tables"
    versions.mkdir()
    publish_again(versions, model, 0)
    options = Options(served=served_models, refresh=RefreshSettings(tables=versions, poll_s=0.5))
    assemble(model, folder / "deployment", options)
    with served(folder / "deployment") as facts:
        return soak_server(
            facts["url"], facts["serve_pid"], _requests_of(model, "ci"), seconds, rate, served_models,
            lambda number: publish_again(versions, model, number),
        )  # fmt: skip


def _requests_of(model: ModelFolder, profile: str) -> list[Tensors]:
    source = generate_requests(model, profile=profile, count=64, seed=1)
    return [source.pack([row]) for row in range(len(source))]


def soak_server(
    url: str, pid: int, requests: Sequence[Tensors], seconds: float, rate: float,
    served_models: Sequence[str] = SERVED, refresh: Callable[[int], None] | None = None,
) -> Soaked:  # fmt: skip
    """Sends requests to a server that runs. pid: of its ``serve``. refresh: called at each turn of the load."""
    turn_s = max(2.0, seconds / _TURNS)
    sent = shed = number = 0
    failed: dict[str, int] = {}
    with UsageWatch(pid, max(0.5, seconds / 400)) as watch:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            number += 1
            if refresh is not None:
                refresh(number)
            name = served_models[number % len(served_models)]
            with Clients(TritonAddress(url=url, model=name), requests) as clients:
                loop = OpenLoop(offsets_s=poisson(rate, turn_s, number), most_waiting=1 << 30)
                records = clients.run(loop)
            refused = set(records.shed)
            sent, shed = sent + len(records), shed + len(refused)
            for text in (text for at, text in records.errors.items() if at not in refused):
                failed[text] = failed.get(text, 0) + 1
    return Soaked(
        seconds=watch.seen[-1][0], requests=sent, shed=shed, failed=failed,
        refreshes=0 if refresh is None else number, growths=trends(watch.seen),
    )  # fmt: skip


def row_of(found: Soaked, model: ModelFolder, rate: float, served_models: tuple[str, ...] = SERVED) -> ResultRow:
    """A run as a row of suite ``soak``; its time is that between two requests."""
    figures = {f"{g.name}_median": g.median for g in found.growths} | {
        f"{g.name}_growth": round(g.growth, 3) for g in found.growths
    }
    counts = {
        "seconds": found.seconds, "requests": found.requests, "shed": found.shed,
        "failed": sum(found.failed.values()), "refreshes": found.refreshes,
    }  # fmt: skip
    per_s = found.requests / found.seconds
    alone = "" if served_models == SERVED else f"{','.join(served_models)} alone, "
    return ResultRow(
        **vars(provenance_here(None)), suite=SUITE, case=f"{model.name} {model.precision}",
        variant=f"{alone}{rate:g} requests/s for {found.seconds:.0f} s", median_us=1e6 / per_s, spread=0.0, per_s=per_s,
        checks={name: float(value) for name, value in {**counts, **figures}.items()},
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """The verb."""
    parser = suite_parser("soak", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder, made by hstu-trt export")
    parser.add_argument("--url", help="of a server of that model which runs, with --server-pid: nothing is published")
    parser.add_argument("--server-pid", type=count, help="process id of the serve that watches over it")
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="of the workload, with --url (default: ci)")
    parser.add_argument("--seconds", type=positive, default=1800.0, help="(default: 1800)")
    parser.add_argument("--served", type=parse_served, default=SERVED, metavar="NAMES", help="(default: both)")
    parser.add_argument("--rate", type=positive, default=40.0, help="requests per second (default: 40)")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak_cpu.jsonl", help="the row is added to this file")
    args = parser.parse_args(argv)
    if args.seconds < 20:
        raise ConfigError(f"--seconds {args.seconds:g}: a soak takes at least 20, or its samples tell no trend")
    if (args.url is None) != (args.server_pid is None):
        raise ConfigError("--url and --server-pid go together")
    model = read_model_folder(args.model)
    if args.url is not None:
        requests = _requests_of(model, args.profile)
        found = soak_server(args.url, args.server_pid, requests, args.seconds, args.rate, args.served)
    else:
        with tempfile.TemporaryDirectory(prefix="hstu-trt-soak-") as folder:
            found = soak(model, Path(folder), args.seconds, args.rate, args.served)
    append_rows(args.out, [row_of(found, model, args.rate, args.served)])
    lines = [(g.name, f"{g.median:.4g}", f"{g.growth:+.4g}", f"{g.allowed:.4g}") for g in found.growths]
    print(text_table(("figure", "median", "growth", "allowed"), lines))
    print(
        f"{found.requests} requests in {found.seconds:.0f} s, {found.shed} shed, {sum(found.failed.values())} failed, "
        f"{found.refreshes} refreshes"
    )
    for sentence in found.missed():
        print(f"MISSED: {sentence}", file=sys.stderr)
    return GATE_EXIT_CODE if found.missed() else 0
