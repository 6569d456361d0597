"""``hstu-trt bench in-process``: the same load on an engine in this process, without Triton and gRPC.

What Triton costs is the difference to ``bench serve``. The engine answers one request at a time; ``target.Target``
is what another engine, with batching of its own, has to look like.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hstu_trt.bench.arguments import some_of, suite_parser
from hstu_trt.bench.chain import NORM, RUNNERS, Fused, norm_tensor, open_runner
from hstu_trt.bench.load.client import Loop, Records, drive
from hstu_trt.bench.load.options import add_plan_options, plan_of, reference_of, requests_of
from hstu_trt.bench.load.provenance import provenance_here, results_file
from hstu_trt.bench.load.rows import Subject, row_of, workload_facts
from hstu_trt.bench.load.runs import Watched, progress_of, report
from hstu_trt.bench.load.scenarios import SCENARIOS
from hstu_trt.bench.load.serve_accuracy import judge, reference_scores
from hstu_trt.bench.load.target import CallableTarget, Target, ask_all
from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.tensors import FUSED


class InProcess:
    """Sends loops to a target in this process; a ``scenarios.Sender``."""

    processes = 1

    def __init__(self, target: Target, requests: Sequence[Tensors]) -> None:
        self._target = target
        self._prepared = [target.prepare(request) for request in requests]

    def run(self, loop: Loop) -> Records:
        """Sends the loop's requests."""
        return drive(self._target, self._prepared, loop, cpu_clock=time.thread_time)


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("in-process", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder, made by hstu-trt export")
    parser.add_argument("--runner", choices=RUNNERS, default="onnxruntime", help="(default: onnxruntime)")
    parser.add_argument("--device", default="cpu", help="of runner torch (default: cpu)")
    parser.add_argument("--engines", type=Path, help="of runners tensorrt and tensorrt_rtx")
    parser.add_argument("--attention-norm", metavar="fixed:N", help="(default: max_seq_len)")
    chosen = ("single", "offline", "server", "open")
    text = f"of {','.join(SCENARIOS)} (default: {','.join(chosen)})"
    parser.add_argument("--scenarios", type=some_of(SCENARIOS, "scenarios"), default=chosen, help=text)
    add_plan_options(parser, without=("clients", "timeout"))
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """The verb."""
    args = _parser().parse_args(argv)
    model, plan = read_model_folder(args.model), plan_of(args)
    config = model.ranking_config
    norm = parse_fixed_norm(args.attention_norm or f"fixed:{config.max_seq_len}")
    requests = requests_of(args, model)
    packed = [requests.pack([row]) for row in range(len(requests))]
    feeds = [{**request, NORM: norm_tensor(norm, config, request)} for request in packed]
    reference = reference_of(args, model)
    checked = min(args.check, len(packed))
    expected = reference_scores(reference, packed[:checked], norm, device=args.reference_device)
    name = f"{args.runner}:{args.device}" if args.device != "cpu" else args.runner
    with Fused(model, open_runner(args.runner, model, FUSED, args.device, args.engines)) as fused:
        target = CallableTarget(lambda feed: fused.infer(feed)["preds"])
        checks = judge(model, ask_all(target, feeds[:checked]), expected)
        print(f"{name} scores: {checks.text}", file=sys.stderr, flush=True)
        watched = Watched.of(None, InProcess(target, feeds), plan, progress_of(name))
        watched.run_all(args.scenarios, (1, 4), (), 0.0)
        target.close()
    subject = Subject(
        case=f"{model.name} {model.precision} in process, {requests.source}",
        served=name,
        provenance=provenance_here(args.commit),
        checks=checks,
        workload=workload_facts(requests),
        deployment={"model": model.name, "digest": model.digest[:16], "precision": model.precision, "runner": name},
    )
    rows = [row_of(subject, measured) for measured in watched.found]
    failures = [f"{name}: {failure}" for failure in checks.failures]
    return report(rows, failures, args.out or results_file(rows[0].device), as_json=args.json)
