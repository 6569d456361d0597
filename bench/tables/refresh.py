"""``hstu-trt bench refresh``: a running server under load while tables and dense weights are replaced.

Closed-loop clients ask ``ranking`` and ``ranking_fused`` without a pause. Meanwhile versions are published: whole
tables, deltas, the way back, new dense weights with their tables, and versions that must be refused. Every answer is
held against the scores of the version that it names, which no other version gives. Latencies of requests that ran
while a version was being taken stand beside those of the rest of the same run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.arguments import count, not_negative, suite_parser
from hstu_trt.bench.result_rows import RESULTS, Provenance, ResultRow, append_rows, cores_text, package_versions
from hstu_trt.bench.tables.refresh_load import Load, Sample, check_tellable, expected_scores, wait_for
from hstu_trt.bench.tables.refresh_versions import Published, Store, rows_that_matter
from hstu_trt.bench.workloads.requests_source import generate_requests
from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import GateError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.table_versions import CURRENT_NAME, publish_version, rollback_version
from hstu_trt.contract.text import text_table
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.models.held import LIVE_FOLDER
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.served import SERVED
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch
from hstu_trt.serving.starting import start

POLL_S = 0.1
PHASES = ("between refreshes", "while tables are replaced", "while dense weights are replaced")
_ANSWER_S = 10.0
_AGAIN = "hstu-trt bench refresh"


@dataclass(frozen=True)
class Step:
    """One thing published while the server runs."""

    kind: str
    version: Published
    publish: Callable[[Path], object]
    """Gets the folder of versions."""


def plan_steps(store: Store) -> list[Step]:
    """Ten refreshes, and two that must be refused."""
    v2, d3, d4 = store.tables("v2"), store.delta("d3"), store.delta("d4")
    before = [_publish("tables", v2), _publish("delta", d3), _publish("delta", d4), Step("rollback", d3, _roll_back)]
    damaged = store.damaged("damaged")
    r5, d6, v7, v8 = store.dense("r5"), store.delta("d6"), store.tables("v7"), store.tables("v8")
    foreign = store.foreign("foreign")
    return [
        *before,
        Step("damaged", damaged, lambda root: (root / CURRENT_NAME).write_text(f"{damaged.name}\n")),
        _publish("dense and tables", r5), _publish("delta", d6), _publish("tables", v7),
        _publish("other pair_id", foreign),
        _publish("tables", v8), _publish("dense and tables back", d4), _publish("tables", v2),
    ]  # fmt: skip


def _publish(kind: str, version: Published) -> Step:
    return Step(kind, version, lambda root: publish_version(root / version.name, regenerate=_AGAIN))


def _roll_back(root: Path) -> None:
    rollback_version(root, regenerate=_AGAIN)


@dataclass
class Outcome:
    """What a run under load showed."""

    samples: list[Sample]
    windows: list[tuple[str, float, float]] = field(default_factory=list)
    """Phase, and when a version was published, and served or refused."""
    refreshes: int = 0
    refused: int = 0
    named: set[str] = field(default_factory=set)

    @property
    def wrong(self) -> list[str]:
        """What is not as it should be, by request."""
        return [f"{sample.model}: {sample.verdict}" for sample in self.samples if sample.verdict != "ok"]

    def latencies_ms(self, model: str, phase: str) -> NDArray:
        """Of the requests that ran in a phase; one that saw two counts where more was replaced."""
        chosen = [s for s in self.samples if s.model == model and self._phase(s) == phase]
        return np.asarray([1e3 * (sample.ended - sample.began) for sample in chosen])

    def _phase(self, sample: Sample) -> str:
        seen = {phase for phase, first, end in self.windows if sample.began < end and sample.ended > first}
        return max(seen, key=PHASES.index, default=PHASES[0])


def run_under_load(deployment: Deployment, load: Load, steps: Sequence[Step], live: Path, gap_s: float) -> Outcome:
    """Publishes the steps one by one while the load runs. Raises GateError if one is not taken as it should."""
    outcome = Outcome(load.samples, named=load.named)
    with load:
        time.sleep(gap_s)
        _wait_until(lambda: bool(load.named))
        for step in steps:
            began = time.monotonic()
            step.publish(deployment.versions)
            wait_for(live, step.version, load.models)
            outcome.windows.append((PHASES[2 if step.kind.startswith("dense") else 1], began, time.monotonic()))
            outcome.refused += step.version.must_be_refused
            outcome.refreshes += not step.version.must_be_refused
            time.sleep(gap_s)
            if not step.version.must_be_refused:
                _wait_until(lambda label=step.version.label: label in load.named)  # type: ignore[misc]
    return outcome


def _wait_until(is_so: Callable[[], bool]) -> None:
    """Gives slow requests time to be answered by what has just been published."""
    deadline = time.monotonic() + _ANSWER_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)


def refresh_run(model: ModelFolder, folder: Path, requests: list[Tensors], clients: int, gap_s: float) -> Outcome:
    """Assembles a deployment in ``folder``, serves it, and refreshes it under load."""
    store = Store(folder, model, rows_that_matter(model, requests))
    first, steps = store.last, plan_steps(store)
    settings = RefreshSettings(tables=store.root, poll_s=POLL_S)
    deployment = assemble(model, folder / "deployment", Options(refresh=settings))
    norm = parse_fixed_norm(deployment.attention_norm)
    served = {step.version.label: step.version for step in steps if not step.version.must_be_refused}
    expected = {label: expected_scores(version, requests, norm) for label, version in served.items()}
    expected[first.label] = expected_scores(first, requests, norm)
    check_tellable(expected)
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0))
    process, _ = start(deployment, plan)
    try:
        load = Load(plan.url, requests, expected, clients)
        live = deployment.run / LIVE_FOLDER / str(process.pid)
        return run_under_load(deployment, load, steps, live, gap_s)
    finally:
        process.drain()


def result_rows(outcome: Outcome, case: str, clients: int) -> list[ResultRow]:
    """Per model a row of the latencies in each phase."""
    here = vars(
        Provenance.here(cores_text(), package_versions(("numpy", "onnxruntime", "tritonclient", "nvidia-pytriton")))
    )
    counts = {"failed_or_mixed": len(outcome.wrong), "refreshes": outcome.refreshes, "refused": outcome.refused}
    rows = []
    for model in SERVED:
        usual = float(np.median(outcome.latencies_ms(model, PHASES[0])))
        for phase in PHASES:
            figure = outcome.latencies_ms(model, phase)
            median, p25, p75, p99 = (float(value) for value in np.percentile(figure, (50, 25, 75, 99)))
            checks = {"p99_us": 1e3 * p99, "max_us": 1e3 * float(figure.max()), "requests": len(figure), **counts}
            if lasted := [end - first for name, first, end in outcome.windows if name == phase]:
                checks["refresh_s"] = float(np.median(lasted))
            rows.append(
                ResultRow(
                    **here, suite="refresh", case=f"{case}, {model}, {clients} clients", variant=phase,
                    median_us=1e3 * median, spread=(p75 - p25) / median,
                    ratio_to={PHASES[0]: usual / median}, checks=checks,
                )
            )  # fmt: skip
    return rows


def main(argv: Sequence[str]) -> int:
    """The ``refresh`` suite."""
    parser = suite_parser("refresh", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder, made by hstu-trt export")
    parser.add_argument("--clients", type=count, default=2, help="clients of each of the two models (default: 2)")
    parser.add_argument("--requests", type=count, default=12, help="different requests that they send (default: 12)")
    parser.add_argument("--gap", type=not_negative, default=2.0, help="seconds between refreshes (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "refresh_cpu.jsonl", help="rows go there")
    args = parser.parse_args(argv)
    model = read_model_folder(args.model)
    source = generate_requests(model, profile="ci", count=args.requests, seed=1)
    requests = [source.pack([row]) for row in range(len(source))]
    with tempfile.TemporaryDirectory(prefix="hstu-trt-refresh-") as folder:
        outcome = refresh_run(model, Path(folder), requests, args.clients, args.gap)
    rows = result_rows(outcome, f"{model.name} {model.precision}", args.clients)
    print(_report(rows))
    if outcome.wrong:
        raise GateError(f"{len(outcome.wrong)} of {len(outcome.samples)} requests failed or mixed: {outcome.wrong[0]}")
    print(
        f"{len(outcome.samples)} requests, 0 failed, 0 mixed; {outcome.refreshes} refreshes, "
        f"{outcome.refused} refused, {len(outcome.named)} versions answered"
    )
    append_rows(args.out, rows)
    return 0


def _report(rows: Sequence[ResultRow]) -> str:
    cells = [
        (
            row.case, row.variant, int(row.checks["requests"]), f"{row.median_us / 1e3:.2f}",
            f"{row.checks['p99_us'] / 1e3:.2f}", f"{row.checks['max_us'] / 1e3:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    return text_table(("case", "requests that ran", "number", "p50 ms", "p99 ms", "max ms"), cells)
