"""``hstu-trt bench serve``: puts a deployment under load and adds rows to the results.

Starts the deployment (or takes a running server of it), holds its scores against PyTorch, then runs the scenarios.
Exit code 1 if a gate of the scores was missed, or a server search found no rate within its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_trt.bench.generate import DEFAULT_SEED
from hstu_trt.bench.load_processes import Clients
from hstu_trt.bench.load_rows import Measured, Subject, load_table, row_of, steps_table, workload_facts
from hstu_trt.bench.load_scenarios import SCENARIOS, Bound, Outcome, Plan, Scenarios, sweep_rates
from hstu_trt.bench.load_target import TritonAddress, ask_all
from hstu_trt.bench.machine_watch import MachineWatch
from hstu_trt.bench.profiles import PROFILES
from hstu_trt.bench.requests_source import Requests, generate_requests, read_requests
from hstu_trt.bench.result_rows import RESULTS, Provenance, ResultRow, append_rows, device_slug, package_versions
from hstu_trt.bench.serve_accuracy import Checks, judge, reference_scores
from hstu_trt.bench.tables import cpu_name
from hstu_trt.bench.triton_statistics import Statistics, added, read_statistics
from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.serving.deployment import Deployment, read_deployment
from hstu_trt.serving.serve import check, start
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch, tensorrt_flags

GATE_EXIT_CODE = 1
_SERVED = (ENSEMBLE, FUSED)


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """A served deployment, requests for it, and what its scores are held against."""

    deployment: Deployment
    url: str
    server_version: str
    requests: Requests
    packed: Sequence[Tensors]
    checked: int
    """The first so many requests are held against the reference."""
    expected: Sequence[Any]

    @property
    def case(self) -> str:
        """As in ``demo fp32 cpu, profile ci, seed 1001``."""
        model = self.deployment.model
        return f"{model.name} {model.precision} {self.deployment.flavour}, {self.requests.source}"

    def check_scores(self, served: str) -> Checks:
        """The served model's scores against PyTorch's."""
        target = TritonAddress(url=self.url, model=served).open()
        try:
            scores = ask_all(target, self.packed[: self.checked])
        finally:
            target.close()
        return judge(self.deployment.model, scores, self.expected)

    def subject(self, served: str, provenance: Provenance) -> Subject:
        """What rows of a served model say about it."""
        deployment = self.deployment
        facts = {
            "model": deployment.model.name,
            "digest": deployment.model.digest[:16],
            "precision": deployment.model.precision,
            "flavour": deployment.flavour,
            "attention_norm": deployment.attention_norm,
            "tritonserver": self.server_version,
        }
        return Subject(
            case=self.case,
            served=served,
            provenance=provenance,
            checks=self.check_scores(served),
            workload=workload_facts(self.requests),
            deployment=facts,
        )


@contextlib.contextmanager
def running(deployment: Deployment, url: str | None = None) -> Iterator[tuple[str, str]]:
    """The deployment's server: a running one, or one that is started and drained; its url and version."""
    if url is not None:
        import tritonclient.grpc as grpc_client

        with grpc_client.InferenceServerClient(url) as client:
            yield url, str(client.get_server_metadata().version)
        return
    check(deployment)
    server = find_tritonserver()
    flags = tensorrt_flags(server) if deployment.flavour == "tensorrt" else ()
    process, ready = start(
        deployment, plan_launch(server, deployment.repository, deployment.run, Listen(grpc_port=0), flags)
    )
    try:
        yield process.plan.url, ready.version
    finally:
        process.drain()


@dataclass(kw_only=True)
class Watched:
    """Runs scenarios on a served model, with Triton's statistics and the machine's around the runs of each."""

    url: str
    runs: Scenarios
    found: list[Measured] = field(default_factory=list)
    _before: Statistics = field(default_factory=dict)

    @classmethod
    def of(cls, url: str, clients: Clients, plan: Plan, progress: Any) -> Watched:
        """Warmed up."""
        watched = cls(url=url, runs=Scenarios(sender=clients, plan=plan, progress=progress))
        watched.runs = dataclasses.replace(watched.runs, before_repeats=watched.mark)
        watched.runs.warm_up()
        return watched

    def mark(self) -> None:
        """Counters from here on are those of the next outcome."""
        self._before = read_statistics(self.url)

    def run(self, scenario: str, *setting: float) -> Outcome:
        """One scenario, noted."""
        with MachineWatch() as watch:
            outcome: Outcome = getattr(self.runs, scenario)(*setting)
        steps = added(self._before, read_statistics(self.url))
        self.found.append(Measured(outcome=outcome, steps=steps, machine=watch.facts()))
        return outcome

    def run_all(self, scenarios: Sequence[str], in_flight: Sequence[int], rates: Sequence[float], guess: float) -> None:
        """The chosen scenarios, each knowing the throughput that those before it found. A guess of 0 means none."""
        most = 0.0
        if "single" in scenarios:
            self.run("single")
        for number in in_flight if "closed" in scenarios else ():
            self.run("closed", number)
        if "offline" in scenarios:
            most = self.run("offline").repeated.median("per_s")
        if not most and {"server", "open"} & set(scenarios):
            most = _quick_offline(self.runs)
        highest = 0.8 * most
        if "server" in scenarios:
            highest = float(self.run("server", guess or 0.6 * most).found["rate"])
        for rate in (rates or sweep_rates(highest)) if "open" in scenarios else ():
            self.run("open", rate)


def _quick_offline(runs: Scenarios) -> float:
    """A first idea of the throughput."""
    short = dataclasses.replace(runs.plan, seconds=min(3.0, runs.plan.seconds), repeats=1)
    return dataclasses.replace(runs, plan=short).offline().repeated.median("per_s")


def _progress(served: str) -> Any:
    return lambda text: print(f"{served} {text}", file=sys.stderr, flush=True)


def open_workbench(
    deployment: Deployment,
    requests: Requests,
    url: str,
    version: str,
    *,
    checked: int,
    reference: ModelFolder,
    device: str,
) -> Workbench:
    """Packs the requests and scores the first ``checked`` of them with the reference."""
    packed = [requests.pack([row]) for row in range(len(requests))]
    norm = parse_fixed_norm(deployment.attention_norm)
    expected = reference_scores(reference, packed[:checked], norm, device=device)
    return Workbench(
        deployment=deployment,
        url=url,
        server_version=version,
        requests=requests,
        packed=packed,
        checked=checked,
        expected=expected,
    )


def device_here() -> str:
    """What rows name as the device: the GPU, or the CPU with its cores."""
    import os

    from hstu_trt.bench.machine_watch import gpu_description

    gpu = gpu_description()
    return gpu.partition(",")[0] if gpu else f"{cpu_name()}, {os.cpu_count()} CPUs"


def results_file(device: str) -> Path:
    """Where rows go by default."""
    from hstu_trt.bench.machine_watch import gpu_description

    return RESULTS / f"serve_{device_slug(device) if gpu_description() else 'cpu'}.jsonl"


def provenance_here(commit: str | None) -> Provenance:
    """Of rows that are measured now."""
    packages = ("torch", "onnxruntime", "tritonclient", "numpy", "grpcio", "nvidia-pytriton")
    return Provenance.here(device_here(), package_versions(packages), commit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt bench serve", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--deployment", type=Path, required=True, help="folder made by hstu-trt assemble")
    parser.add_argument("--url", help="host:port of a running server of it (default: one is started)")
    parser.add_argument("--served", default="both", choices=("both", *_SERVED), help="(default: both)")
    names = f"of {','.join(SCENARIOS)} (default: single,offline,server,open)"
    parser.add_argument("--scenarios", default="single,offline,server,open", help=names)
    add_plan_options(parser)
    parser.add_argument("--in-flight", type=_integers, default=[1, 4, 16], help="closed: as in 1,4,16 (the default)")
    parser.add_argument("--rates", type=_floats, help="open: requests per second (default: shares of the highest rate)")
    parser.add_argument("--guess", type=float, help="server: rate at which the search begins")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and for how long")
    return parser


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Options that every command that sends load has."""
    plan = Plan()
    parser.add_argument("--slo-ms", type=float, default=plan.bound.ms, help="bound on the latency (default: 80)")
    parser.add_argument("--percentile", type=float, default=99.0, help="that the bound is on (default: 99)")
    parser.add_argument(
        "--seconds", type=float, default=plan.seconds, help="per run (default: 10; to quote: 60 or more)"
    )
    parser.add_argument(
        "--probe-seconds", type=float, default=plan.probe_seconds, help="server: per probe (default: 5)"
    )
    parser.add_argument("--repeats", type=int, default=plan.repeats, help="of each run (default: 3)")
    parser.add_argument("--offline-in-flight", type=int, default=plan.in_flight, help="(default: 64)")
    parser.add_argument("--single-requests", type=int, default=plan.single_requests, help="(default: 500)")
    parser.add_argument("--clients", type=int, default=1, help="client processes (default: 1)")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds to wait for an answer (default: 30)")
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="of the workload (default: ci)")
    parser.add_argument("--inputs", type=Path, help="own requests instead: .npz, a folder of them, or .safetensors")
    parser.add_argument("--requests", type=int, default=256, help="different requests, sent in turn (default: 256)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--check", type=int, default=256, help="requests held against PyTorch (default: 256)")
    parser.add_argument(
        "--reference", type=Path, help="model folder in fp32 to check against (default: the served one)"
    )
    parser.add_argument("--reference-device", default="cpu", help="where PyTorch computes (default: cpu)")
    parser.add_argument("--commit", help="for the rows, where this is no git checkout")
    parser.add_argument("--out", type=Path, help="rows are added to this file (default: bench/results/serve_*.jsonl)")


def plan_of(args: argparse.Namespace) -> Plan:
    """The plan that the options ask for. Raises ConfigError."""
    return Plan(
        seconds=args.seconds,
        probe_seconds=args.probe_seconds,
        repeats=args.repeats,
        bound=Bound(ms=args.slo_ms, percentile=args.percentile),
        in_flight=args.offline_in_flight,
        single_requests=args.single_requests,
        seed=args.seed,
    )


def requests_of(args: argparse.Namespace, model: ModelFolder) -> Requests:
    """The requests that the options ask for."""
    if args.inputs is not None:
        return read_requests(args.inputs, model.ranking_config)
    return generate_requests(model, profile=args.profile, count=args.requests, seed=args.seed)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(argv: Sequence[str]) -> int:
    """The verb."""
    args = _parser().parse_args(argv)
    plan, scenarios = plan_of(args), args.scenarios.split(",")
    unknown = set(scenarios) - set(SCENARIOS)
    if unknown:
        raise ConfigError(f"unknown scenarios {', '.join(sorted(unknown))}: choose from {', '.join(SCENARIOS)}")
    served = _SERVED if args.served == "both" else (args.served,)
    deployment = read_deployment(args.deployment)
    requests = requests_of(args, deployment.model)
    if args.dry_run:
        print(_dry_run(deployment, requests, served, scenarios, plan))
        return 0
    # A terminated run must stop its server, too: the interrupt unwinds through the code that drains it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    reference = read_model_folder(args.reference) if args.reference else deployment.model
    rows, failures = [], []
    with running(deployment, args.url) as (url, version):
        checked = min(args.check, len(requests))
        bench = open_workbench(
            deployment, requests, url, version, checked=checked, reference=reference, device=args.reference_device
        )
        for name in served:
            subject = bench.subject(name, provenance_here(args.commit))
            failures += [f"{name}: {failure}" for failure in subject.checks.failures]
            print(f"{name} scores: {subject.checks.text}", file=sys.stderr, flush=True)
            address = TritonAddress(url=url, model=name, timeout_s=args.timeout)
            with Clients(address, bench.packed, processes=args.clients) as clients:
                watched = Watched.of(url, clients, plan, _progress(name))
                watched.run_all(scenarios, args.in_flight, args.rates or (), args.guess or 0.0)
            found = watched.found
            rows += [row_of(subject, measured) for measured in found]
            failures += [
                f"{name}: no rate within {m.outcome.found['bound']}"
                for m in found
                if not m.outcome.found.get("kept", True)
            ]
    return report(rows, failures, args.out or results_file(rows[0].device), as_json=args.json)


def report(rows: Sequence[ResultRow], failures: Sequence[str], out: Path, *, as_json: bool) -> int:
    """Writes the rows, prints them, and returns the exit code."""
    append_rows(out, rows)
    if as_json:
        print("[" + ",\n ".join(row.to_json() for row in rows) + "]")
    else:
        print(f"{rows[0].case} on {rows[0].device}\n{load_table(rows)}\n\n{steps_table(rows)}")
    print(f"{len(rows)} rows added to {out}, commit {rows[0].commit}", file=sys.stderr)
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return GATE_EXIT_CODE if failures else 0


def _dry_run(
    deployment: Deployment, requests: Requests, served: Sequence[str], scenarios: Sequence[str], plan: Plan
) -> str:
    lengths = requests.history_lengths
    return "\n".join(
        [
            f"deployment  {deployment.path} ({deployment.flavour}, {deployment.model.precision})",
            f"requests    {len(requests)} ({requests.source}), {lengths.mean():.0f} events on average",
            f"served      {', '.join(served)}",
            f"scenarios   {', '.join(scenarios)}; {plan.repeats} runs of {plan.seconds:g} s each",
            f"bound       {plan.bound.text}",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt bench serve"))
