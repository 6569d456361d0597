"""``hstu-trt bench demo``: the whole road on one machine, from a checkpoint to ranked candidates.

Exports the trained checkpoint of the tests in fp32 and fp16, checks accuracy, assembles a deployment, serves it, sends
the CI workload through the ensemble and the fused model, and holds every score against PyTorch. Each step is a verb or
function of its room; the commands are printed, so that they can be tried one by one.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.accuracy.verb import Variant
from hstu_trt.bench.arguments import count, suite_parser
from hstu_trt.bench.chain import NORM, norm_tensor
from hstu_trt.bench.load.traffic import Answers, send
from hstu_trt.bench.workloads.requests_source import user_batches
from hstu_trt.bench.workloads.workload import Workload
from hstu_trt.contract import cli
from hstu_trt.contract.attention_norm import parse_attention_norm
from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.contract.features import Tensors, pack_request
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.contract.text import text_table
from hstu_trt.serving.deployment import Deployment, read_deployment
from hstu_trt.serving.requests import one_user
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch
from hstu_trt.serving.starting import start

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
FUSED_CLIENTS = 8
MAX_HISTORY = "256"  # the longest history of the CI workload; the checkpoint's own config stops at 128
SHOWN_CANDIDATES = 5
MIN_SHOWN_HISTORY = 20
STEPS = 8


@dataclass(kw_only=True)
class Demo:
    """Where the demo writes, and what it found."""

    out: Path
    requests: int
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def onnx(self, precision: str) -> Path:
        return self.out / "onnx" / "demo" / precision

    @property
    def deployment(self) -> Path:
        return self.out / "deployments" / "demo"

    @property
    def folder(self) -> Path:
        return self.out / "demo"

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Numbers a step and tells how long it took."""
        print(f"\n[{len(self.seconds) + 1}/{STEPS}] {title}", flush=True)
        began = time.perf_counter()
        yield
        self.seconds[title] = round(time.perf_counter() - began, 1)
        print(f"      {self.seconds[title]:.1f} s", flush=True)

    def verb(self, *arguments: str | Path, printed_to: Path | None = None) -> None:
        """Runs a verb of the command line. A failed gate is noted, any other failure ends the demo."""
        words = [str(argument) for argument in arguments]
        print(f"$ hstu-trt {shlex.join(words)}", flush=True)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed) if printed_to else contextlib.nullcontext():
            code = cli.main(words)
        if printed_to:
            write_text_atomically(printed_to, printed.getvalue())
        if code == 1:
            self.failures.append(f"hstu-trt {' '.join(words[:2])}: beyond a gate, see above")
        elif code:
            raise HstuTrtError(f"hstu-trt {words[0]} ended with code {code}")


def run(demo: Demo) -> None:
    """All steps; what fails a check is in ``demo.failures`` at the end."""
    with demo.step("environment"):
        print(environment())
    for precision in ("fp32", "fp16"):
        with demo.step(f"checkpoint -> ONNX, {precision}"):
            source = ("--config", shown(GOLDEN / "caseA" / "config.json"), "--weights", shown(GOLDEN / "ckptA"))
            options = ("--precision", precision, "--max-history", MAX_HISTORY, "--name", "demo")
            demo.verb("export", *source, *options, "--out", demo.onnx(precision))
    requests = ("--requests", str(demo.requests))
    with demo.step("workload"):
        demo.verb("bench", "workload", "--model", demo.onnx("fp32"), *requests, "--out", demo.folder / "workload")
    with demo.step("accuracy: PyTorch against ONNX Runtime"):
        models = ("--model-fp32", demo.onnx("fp32"), "--model-fp16", demo.onnx("fp16"))
        text = demo.folder / "accuracy.txt"
        demo.verb("bench", "accuracy", *models, *requests, "--out", demo.folder, printed_to=text)
        print(accuracy_summary(demo.folder))
    with demo.step("deployment"):
        demo.verb("assemble", "--model", demo.onnx("fp32"), "--flavour", "cpu", "--out", demo.deployment)
    deployment = read_deployment(demo.deployment, verify=False)
    workload = Workload.load(demo.folder / "workload")
    with demo.step(f"{len(workload)} requests over gRPC through {ENSEMBLE} and {FUSED}"):
        answers = serve_and_send(deployment, workload, demo)
    with demo.step("served scores against PyTorch"):
        expected = torch_scores(deployment, workload)
        report(demo, deployment.model, workload, answers, expected)


def shown(path: Path) -> Path:
    """The path as a user would type it here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def environment() -> str:
    """Versions of what does the work."""
    names = ("torch", "onnx", "onnxruntime", "tritonclient", "numpy")
    rows = [("Python", platform.python_version()), *((name, metadata.version(name)) for name in names)]
    return text_table(("part", "version"), [*rows, ("tritonserver from", find_tritonserver().origin)])


def accuracy_summary(folder: Path) -> str:
    """The tensors' table of the accuracy report, and how many of its gates were kept."""
    facts = json.loads((folder / "accuracy.json").read_text())
    rows = [
        (t["variant"], t["tensor"], f"{t['max_abs']:.1e}", f"{t['tolerance']:g}", "ok" if t["passed"] else "BEYOND")
        for t in facts["tensors"]
    ]
    gated = [*facts["tensors"], *(metric for metric in facts["metrics"] if metric["gate"] is not None)]
    kept = sum(bool(figure["passed"]) for figure in gated)
    table = text_table((f"against {facts['reference']}", "output", "max |difference|", "allowed", ""), rows)
    return f"{table}\n{kept} of {len(gated)} gates kept, ranking metrics among them: {folder / 'accuracy.txt'}"


def serve_and_send(deployment: Deployment, workload: Workload, demo: Demo) -> dict[str, Answers]:
    """Starts the server, sends every request to both models, and stops the server, whatever happens."""
    print(f"$ hstu-trt serve --deployment {demo.deployment} --grpc-port 0", flush=True)
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0))
    process, ready = start(deployment, plan)
    try:
        print(f"tritonserver {ready.version} ready after {ready.seconds:.1f} s at {plan.url}", flush=True)
        config = deployment.model.ranking_config
        packed = [pack_request(config, *workload.features(config, row)) for row in range(len(workload))]
        answers = {
            ENSEMBLE: send(plan.url, ENSEMBLE, packed, clients=1),
            FUSED: send(plan.url, FUSED, [one_user(request) for request in packed], clients=FUSED_CLIENTS),
        }
    finally:
        code = process.drain()
    print(f"tritonserver stopped with code {code}, log: {plan.log}")
    if code:
        demo.failures.append(f"tritonserver stopped with code {code}")
    return answers


def torch_scores(deployment: Deployment, workload: Workload) -> NDArray:
    """Scores ``[candidates, tasks]`` of the whole workload by the PyTorch model, users in batches."""
    model = deployment.model
    config = model.ranking_config
    norm = parse_attention_norm(deployment.attention_norm, config)
    scores = []
    with Variant(kind="torch", model=model, fused=False).open() as chain:
        for rows in user_batches(workload, model.limits):
            packed: Tensors = pack_request(config, *workload.batch(config, rows))
            scores.append(chain.infer({**packed, NORM: norm_tensor(norm, config, packed)})["preds"])
    return np.concatenate(scores)


def report(demo: Demo, model: ModelFolder, workload: Workload, answers: dict[str, Answers], expected: NDArray) -> None:
    """Checks the served scores, and prints figures, one user's ranking and where everything lies."""
    rows = []
    for name, answer in answers.items():
        difference = compare(name, np.concatenate(answer.scores), expected)
        tolerance = TOLERANCES[name, model.precision]
        passed = difference.passes(tolerance)
        if not passed:
            demo.failures.append(f"{difference.text()}; tolerance {tolerance.atol:g}")
        verdict = "pass" if passed else "FAIL"
        rows.append((name, *answer.figures(), f"{difference.max_abs:.1e}", f"{tolerance.atol:.0e}", verdict))
    header = ("model", "requests", "clients", "p50 ms", "p90 ms", "p99 ms", "per s", "max |diff|", "allowed", "check")
    print(text_table(header, rows))
    demo.facts["models"] = [dict(zip(header, row, strict=True)) for row in rows]
    print(f"\n{ranking(model, workload, answers, expected)}")


def ranking(model: ModelFolder, workload: Workload, answers: dict[str, Answers], expected: NDArray) -> str:
    """The best candidates of the first user with some history, as served and as PyTorch scores them."""
    enough = np.flatnonzero(workload.history_lengths >= MIN_SHOWN_HISTORY)
    row = int(enough[0]) if enough.size else 0
    config = model.ranking_config
    candidates = workload.features(config, row)[1]
    ids = [candidates[name].values for name in config.candidate_features]
    by_torch = expected[workload.cand_off[row] : workload.cand_off[row + 1], 0]
    scores = [answers[ENSEMBLE].scores[row][:, 0], answers[FUSED].scores[row][:, 0], by_torch]
    order = np.argsort(-scores[0], kind="stable")
    different = np.sort(np.unique(ids[0][order], return_index=True)[1])
    best = order[different][:SHOWN_CANDIDATES]
    lines = [(n, *(int(i[at]) for i in ids), *(f"{s[at]:.6f}" for s in scores)) for n, at in enumerate(best, 1)]
    user, events = workload.user_id[row], workload.history_lengths[row]
    header = ("rank", *config.candidate_features, ENSEMBLE, FUSED, "PyTorch")
    task, of = config.tasks[0].name, f"{len(different)} different candidates"
    title = f"user {user}, {events} events: the best {len(best)} of {of} by {task!r}"
    return f"{title}\n{text_table(header, lines)}"


def own_command() -> str:
    """``hstu-trt`` where the shell finds it, else the path of the one beside this Python: .venv need not be active."""
    beside = Path(sys.executable).with_name("hstu-trt")
    return "hstu-trt" if shutil.which("hstu-trt") else os.path.relpath(beside)


def artefacts(demo: Demo) -> str:
    """Where each artefact lies."""
    rows = [
        ("ONNX files and tables", demo.out / "onnx" / "demo"),
        ("workload", demo.folder / "workload"),
        ("accuracy report", demo.folder / "accuracy.txt"),
        ("Triton deployment", demo.deployment),
        ("server log", demo.deployment / "run"),
        ("this run's figures", demo.folder / "demo.json"),
    ]
    return text_table(("artefact", "path"), rows)


def finish(demo: Demo, as_json: Callable[[str], None] | None) -> int:
    """Writes ``demo.json``, prints the verdict and returns the exit code."""
    passed = not demo.failures
    facts = {"passed": passed, "failures": demo.failures, "seconds": demo.seconds, **demo.facts}
    text = json.dumps(facts, indent=1)
    write_text_atomically(demo.folder / "demo.json", text + "\n")
    print(f"\n{artefacts(demo)}\n")
    for failure in demo.failures:
        print(f"FAILED: {failure}")
    print(f"demo {'passed' if passed else 'failed'} in {sum(demo.seconds.values()):.0f} s")
    if passed:
        print(f"serve it yourself: {own_command()} serve --deployment {demo.deployment}")
    if as_json is not None:
        as_json(text)
    return 0 if passed else 1


def main(argv: Sequence[str]) -> int:
    """Runs the demo; exit code 1 if a check fails."""
    parser = suite_parser("demo", __doc__)
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for the artefacts (default: build)")
    parser.add_argument("--requests", type=count, default=256, help="requests per model (default: 256)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, everything else to stderr")
    args = parser.parse_args(argv)
    demo = Demo(out=args.out, requests=args.requests)
    if not args.json:
        run(demo)
        return finish(demo, None)
    stdout = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        run(demo)
        return finish(demo, lambda text: print(text, file=stdout))
