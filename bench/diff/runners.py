"""``hstu-trt diff --model DIR --a RUNNER --b RUNNER``: where does one runner part from another, and does it matter?

Polygraphy's Comparator runs both on the same requests: three stages in a row, the output of every layer, and the fused
graph. Each output is held to the contract's tolerance, each task's ranking to the gates of ``contract/gates.py``. The
report names the first layer beyond its tolerance and shows the error by layer and by length of history.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.accuracy.comparator import Batch, run_batches
from hstu_trt.bench.accuracy.fidelity import Figure, Scores, task_figures
from hstu_trt.bench.accuracy.metrics import teacher_labels
from hstu_trt.bench.accuracy.verb import show_progress
from hstu_trt.bench.arguments import count, whole
from hstu_trt.bench.chain import NORM, norm_tensor
from hstu_trt.bench.diff.divergence import DEFAULT_EDGES, ErrorLog, parse_edges, request_of_rows
from hstu_trt.bench.diff.page import page
from hstu_trt.bench.diff.report import DiffReport
from hstu_trt.bench.diff.sides import PARTS, Side, coarser, tolerances
from hstu_trt.bench.result_rows import package_versions
from hstu_trt.bench.workloads.generate import DEFAULT_SEED
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import Requests, generate_requests, read_requests, user_batches
from hstu_trt.contract.attention_norm import parse_attention_norm
from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.gates import RANKING_GATES
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.contract.model_folder import read_model_folder

GATE_EXIT_CODE = 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to compare."""

    norm: float | None
    """N of the attention; None is the longest sequence of each batch."""
    edges: Sequence[int] = DEFAULT_EDGES
    parts: Sequence[str] = PARTS
    """What is compared beside the three stages: ``layers``, ``fused``."""
    seed: int = DEFAULT_SEED
    """Of the labels that the ranking metrics are measured on."""
    progress: bool = False


@dataclass(kw_only=True)
class _Seen:
    """What is kept of the batches."""

    log: ErrorLog
    scores: dict[str, list[NDArray]]

    def add(self, batch: Batch, a: str, b: str, slots: int) -> None:
        users = len(batch.feed["uih_offsets"]) - 1
        for name, expected in batch.outputs[a].items():
            if name not in batch.outputs[b]:
                raise InputError(
                    f"{b} answers no {name!r}, {a} does: build its engines with the layers, or --skip layers"
                )
            actual = batch.outputs[b][name]
            if actual.shape != expected.shape:
                raise InputError(f"{name} has shape {list(actual.shape)} by {b}, {list(expected.shape)} by {a}")
            self.log.add(name, actual, expected, request_of_rows(name, batch.feed, slots), users)
        self.log.judge(batch.verdicts[b])
        for side in (a, b):
            self.scores[side].append(batch.outputs[side]["preds"])


def measure(a: Side, b: Side, requests: Requests, options: Options) -> DiffReport:
    """Runs both sides on the requests. Raises InputError where there is none, or the two answer different shapes."""
    if not len(requests):
        raise InputError(f"{requests.source} holds no request with a candidate")
    limits, slots = a.model.limits, len(a.model.ranking_config.contextual_slots)
    names = _names(a, b)
    accepted = tolerances(a, b, options.parts)
    outputs = [*accepted, *(tensor.name for tensor in a.model.specs["embedding_lookup"].outputs)]
    seen = _Seen(log=ErrorLog(tolerances=accepted), scores={name: [] for name in names})
    runners = {name: side.open(options.parts) for name, side in zip(names, (a, b), strict=True)}
    batches = list(user_batches(requests, limits))

    def feeds() -> Iterator[Tensors]:
        for number, rows in enumerate(batches, 1):
            packed = requests.pack(rows)
            if options.progress:
                show_progress("diff", number, len(batches))
            yield {**packed, NORM: norm_tensor(options.norm, a.model.ranking_config, packed)}

    for batch in run_batches(runners, dict.fromkeys(names, accepted), feeds(), dict.fromkeys(outputs)):
        seen.add(batch, *names, slots)
    preds = {name: np.concatenate(parts) for name, parts in seen.scores.items()}
    return DiffReport(
        a=names[0],
        b=names[1],
        facts=_facts(a, b, options),
        requests=requests,
        edges=options.edges,
        outputs=seen.log.outputs(),
        preds_a=preds[names[0]],
        preds_b=preds[names[1]],
        tasks=_tasks(a, b, requests, preds, options.seed),
    )


def _names(a: Side, b: Side) -> tuple[str, str]:
    return (a.name, b.name) if a.name != b.name else (f"{a.name} (A)", f"{b.name} (B)")


def _tasks(a: Side, b: Side, requests: Requests, preds: Mapping[str, NDArray], seed: int) -> dict[str, list[Figure]]:
    """The ranking figures of every task."""
    reference, actual = preds.values()
    precision = coarser(a.model.precision, b.model.precision)
    return {
        task.name: task_figures(
            Scores(
                p=actual[:, number],
                reference=reference[:, number],
                labels=teacher_labels(reference[:, number], seed + number),
                offsets=requests.candidate_offsets,
            ),
            task,
            precision,
            RANKING_GATES,
        )
        for number, task in enumerate(a.model.ranking_config.tasks)
    }


def _facts(a: Side, b: Side, options: Options) -> dict[str, Any]:
    def side(one: Side) -> dict[str, Any]:
        return {
            "runner": one.runner,
            "model": str(one.model.path),
            "precision": one.model.precision,
            "digest": one.model.digest,
            "engines": None if one.engines is None else str(one.engines),
        }

    return {
        "model": a.model.name,
        "sides": {"a": side(a), "b": side(b)},
        "attention_norm": "batch_max" if options.norm is None else options.norm,
        "label_seed": options.seed,
        "versions": package_versions(("torch", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13", "polygraphy", "numpy")),
    }


def main(argv: Sequence[str]) -> int:
    """Compares, writes the reports, prints the summary; exit code 1 beyond a gate."""
    args = parser().parse_args(argv)
    a, b = _sides(args)
    options = Options(
        norm=parse_attention_norm(args.attention_norm, a.model.ranking_config),
        edges=parse_edges(args.buckets),
        parts=[part for part in PARTS if part not in args.skip],
        seed=args.seed,
        progress=True,
    )
    requests = (
        read_requests(args.inputs, a.model.ranking_config)
        if args.inputs
        else generate_requests(a.model, profile=args.profile, count=args.requests, seed=args.seed)
    )
    report = measure(a, b, requests, options)
    facts = json.dumps(report.as_json(), indent=1)
    for name, text in {"diff.json": facts, "diff.txt": report.text(), "diff.html": page(report)}.items():
        write_text_atomically(args.out / name, text + "\n")
    print(facts if args.json else f"{report.text()}\npictures: {args.out / 'diff.html'}")
    for failure in report.failures():
        print(f"hstu-trt diff: beyond the gate: {failure}", file=sys.stderr)
    return GATE_EXIT_CODE if report.failures() else 0


def parser() -> argparse.ArgumentParser:
    """The options of this form of ``diff``."""
    found = argparse.ArgumentParser(prog="hstu-trt diff", description=(__doc__ or "").partition("\n\n")[2])
    found.add_argument("--model", type=Path, help="exported model folder of both sides")
    found.add_argument("--model-a", type=Path, help="that of A, where it differs (another precision, say)")
    found.add_argument("--model-b", type=Path, help="that of B")
    found.add_argument("--a", default="torch", metavar="RUNNER", help="the reference (%(default)s)")
    found.add_argument("--b", default="onnxruntime", metavar="RUNNER", help="what is held against it (%(default)s)")
    found.add_argument("--engines", type=Path, help="what hstu-trt engines made, for tensorrt and tensorrt_rtx")
    found.add_argument("--engines-a", type=Path, help="that of A, where it differs (another precision, say)")
    found.add_argument("--engines-b", type=Path, help="that of B")
    source = found.add_mutually_exclusive_group()
    source.add_argument("--inputs", type=Path, help="workload (.npz, folder) or .safetensors file of features")
    source.add_argument("--profile", choices=PROFILES, default="ci", help="requests to generate (%(default)s)")
    found.add_argument("--requests", type=count, help="generate at most this many (default: the profile's)")
    found.add_argument("--seed", type=whole, default=DEFAULT_SEED, help="of the requests and the labels (%(default)s)")
    found.add_argument("--buckets", default=",".join(map(str, DEFAULT_EDGES)), help="history lengths (%(default)s)")
    found.add_argument("--skip", choices=PARTS, action="append", default=[], help="leave a part out; may be repeated")
    found.add_argument("--attention-norm", help="fixed:<N> (default: the config's max_seq_len) or batch_max")
    found.add_argument("--out", type=Path, required=True, help="folder for diff.html, diff.txt and diff.json")
    found.add_argument("--json", action="store_true", help="print the report as JSON")
    return found


def _sides(args: argparse.Namespace) -> tuple[Side, Side]:
    folders = [own or args.model for own in (args.model_a, args.model_b)]
    if None in folders:
        raise ConfigError("give --model, or both --model-a and --model-b: the folders of exported models to compare")
    models = {folder: read_model_folder(folder) for folder in folders}
    sides = [
        Side(runner=runner, model=models[folder], engines=engines if runner.startswith("tensorrt") else None)
        for runner, folder, engines in zip(
            (args.a, args.b), folders, (args.engines_a or args.engines, args.engines_b or args.engines), strict=True
        )
    ]
    a, b = sides
    if a.model.config != b.model.config or a.model.limits != b.model.limits:
        raise ArtefactError(
            f"{folders[0]} and {folders[1]} hold different models or limits; export both from one checkpoint"
        )
    return a, b
