"""``hstu-trt bench accuracy``: do other runners and precisions score as PyTorch in fp32 does?

Polygraphy's Comparator runs the three stages in a row and the fused stage with each of them on the requests of a
profile, and holds every output to the contract's tolerance. Ranking metrics on labels drawn from the reference's
scores then say what a difference would mean for a ranking. These gates check numbers, not the quality of the model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.bench.accuracy.comparator import Comparison, compare_runners
from hstu_trt.bench.accuracy.fidelity import Scores, task_figures
from hstu_trt.bench.accuracy.metrics import teacher_labels
from hstu_trt.bench.accuracy.report import AccuracyReport, TensorFigure
from hstu_trt.bench.arguments import count, suite_parser, whole
from hstu_trt.bench.chain import NORM, Chain, Composed, Fused, norm_tensor, open_runner
from hstu_trt.bench.workloads.generate import DEFAULT_SEED, generate
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import user_batches
from hstu_trt.bench.workloads.workload import Workload
from hstu_trt.contract.attention_norm import parse_attention_norm
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.features import Tensors, pack_request
from hstu_trt.contract.gates import RANKING_GATES
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, STAGES, Precision

GATE_EXIT_CODE = 1


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute the scores."""

    kind: str
    """Runner: ``torch`` or ``onnxruntime``."""
    model: ModelFolder
    fused: bool

    @property
    def name(self) -> str:
        """As in ``onnxruntime fp16 fused``."""
        return f"{self.kind} {self.precision} {'fused' if self.fused else 'three stages'}"

    @property
    def precision(self) -> Precision:
        """Precision of the model."""
        return self.model.precision

    @property
    def tolerances(self) -> dict[str, float]:
        """Output -> largest accepted |difference| from the reference."""
        if self.fused:
            return {"preds": TOLERANCES[FUSED, self.model.tolerances].atol}
        return {
            "preds": TOLERANCES[ENSEMBLE, self.model.tolerances].atol,
            "user_embeddings": TOLERANCES["hstu", self.model.tolerances].atol,
        }

    def open(self) -> Composed:
        """The runners of this variant, behind the inputs of the ``ranking`` stage."""
        if self.fused:
            return Fused(self.model, open_runner(self.kind, self.model, FUSED))
        return Chain(self.model, [open_runner(self.kind, self.model, stage) for stage in STAGES])


def variants(models: Sequence[ModelFolder]) -> list[Variant]:
    """PyTorch on the first model, the reference, and ONNX Runtime on each."""
    kinds = (("torch", models[0]), *(("onnxruntime", model) for model in models))
    return [Variant(kind=kind, model=model, fused=fused) for fused in (False, True) for kind, model in kinds]


def measure(
    candidates: Sequence[Variant], workload: Workload, *, norm: float, seed: int, progress: bool = False
) -> AccuracyReport:
    """Compares each variant with the first one on a workload.

    norm: N of the attention. seed: of the teacher's labels.
    """
    config, limits = candidates[0].model.ranking_config, candidates[0].model.limits
    batches = list(user_batches(workload, limits))

    def feeds() -> Iterator[Tensors]:
        for number, rows in enumerate(batches, 1):
            packed = pack_request(config, *workload.batch(config, rows))
            if progress:
                show_progress("accuracy", number, len(batches))
            yield {**packed, NORM: norm_tensor(norm, config, packed)}

    comparison = compare_runners(
        {variant.name: variant.open() for variant in candidates},
        {variant.name: variant.tolerances for variant in candidates},
        feeds(),
    )
    return _report(candidates, workload, comparison, seed)


def show_progress(what: str, done: int, total: int) -> None:
    """One line that counts up on a terminal; in a log, a line at each quarter."""
    text = f"{what}: batch {done} of {total}"
    if sys.stderr.isatty():
        print(f"\r{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 4) == 0:
        print(text, file=sys.stderr, flush=True)


def _report(candidates: Sequence[Variant], workload: Workload, comparison: Comparison, seed: int) -> AccuracyReport:
    reference = comparison.preds[candidates[0].name]
    figures = {}
    for variant in candidates[1:]:
        for number, task in enumerate(variant.model.ranking_config.tasks):
            p_ref = reference[:, number]
            scores = Scores(
                p=comparison.preds[variant.name][:, number],
                reference=p_ref,
                labels=teacher_labels(p_ref, seed + number),
                offsets=workload.cand_off,
            )
            figures[variant.name, task.name] = task_figures(scores, task, variant.precision, RANKING_GATES)
    tensors = [
        TensorFigure(
            variant=worst.runner,
            tensor=worst.tensor,
            max_abs=worst.report.max_abs,
            tolerance=worst.tolerance,
            request=worst.row_to_request(workload.cand_off),
            passed=worst.passed,
        )
        for worst in comparison.worst
    ]
    return AccuracyReport(reference=candidates[0].name, workload=workload, tensors=tensors, tasks=figures)


def main(argv: Sequence[str]) -> int:
    """Measures, writes ``accuracy.json``, prints the tables; exit code 1 beyond a gate."""
    args = _parser().parse_args(argv)
    models = _read_models({"fp32": args.model_fp32, "fp16": args.model_fp16, "fp8": args.model_fp8})
    fp32 = models[0]
    config = fp32.ranking_config
    norm = parse_attention_norm(args.attention_norm, config)
    if norm is None:
        raise ConfigError("bench accuracy compares with one N for all batches: give --attention-norm fixed:<N>")
    profile = PROFILES[args.profile]()
    if args.requests is not None:
        profile = dataclasses.replace(profile, requests=args.requests)
    workload = generate(profile, config, seed=args.seed, limits=fp32.limits)
    report = measure(variants(models), workload, norm=norm, seed=args.seed, progress=True)
    facts = {"model": fp32.name, "profile": args.profile, "seed": args.seed, "attention_norm": norm}
    text = json.dumps({**facts, **report.facts()}, indent=1)
    path = args.out / "accuracy.json"
    write_text_atomically(path, text + "\n")
    print(text if args.json else f"{report.text()}\nwrote {path}")
    for failure in report.failures():
        print(f"hstu-trt bench accuracy: beyond the gate: {failure}", file=sys.stderr)
    return GATE_EXIT_CODE if report.failures() else 0


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("accuracy", __doc__)
    demo = Path("build/onnx/demo")
    parser.add_argument("--model-fp32", type=Path, default=demo / "fp32", help="the reference (%(default)s)")
    parser.add_argument("--model-fp16", type=Path, default=demo / "fp16", help="the same in fp16 (%(default)s)")
    parser.add_argument("--model-fp8", type=Path, help="the same in fp8 (default: none)")
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="workload (default ci)")
    parser.add_argument("--requests", type=count, help="at most this many requests (default: the profile's)")
    parser.add_argument("--seed", type=whole, default=DEFAULT_SEED, help="(default: %(default)s)")
    parser.add_argument("--attention-norm", help="fixed:<N> (default: the config's max_seq_len)")
    parser.add_argument("--out", type=Path, default=Path("build/accuracy"), help="for accuracy.json (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _read_models(folders: Mapping[Precision, Path | None]) -> list[ModelFolder]:
    """The models of one checkpoint, by precision; the first is the reference."""
    models: list[ModelFolder] = []
    for precision, folder in folders.items():
        if folder is None:
            continue
        model = read_model_folder(folder)
        if model.precision != precision:
            raise ArtefactError(f"{folder} holds a model in {model.precision}; {precision} is needed here")
        if models and model.config != models[0].config:
            raise ArtefactError(f"{models[0].path} and {folder} hold different models; export both from one checkpoint")
        models.append(model)
    return models
