"""``hstu-trt bench plan-precision``: what may compute in fp8 under an accuracy budget.

Each part of the model (``contract/fp8_plan.py``) is put into fp8 alone, then all of them at once, in PyTorch on the
CPU, and held against fp32 on requests that it was not calibrated with. Labels are the reference's probabilities, so
that the figures are expectations, free of the noise of drawn labels. While the budget is exceeded, the part goes back
to fp16 that costs the most entropy for the multiplications it saves; at last, parts whose return still fits come back.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.accuracy.fidelity import Figure, Scores, task_figures
from hstu_trt.bench.accuracy.plan_choice import Progress, Trial, choose, facts, table
from hstu_trt.bench.arguments import count, not_negative, suite_parser, whole
from hstu_trt.bench.chain import NORM, norm_tensor
from hstu_trt.bench.files import write_features
from hstu_trt.bench.workloads.generate import DEFAULT_SEED, generate
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import user_batches
from hstu_trt.bench.workloads.workload import Workload
from hstu_trt.contract.attention_norm import parse_attention_norm
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.features import Tensors, pack_request
from hstu_trt.contract.fp8_plan import Fp8Plan
from hstu_trt.contract.gates import RANKING_GATES, RankingGates
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder

PLAN_FILE, CALIBRATION_FILE = "plan.json", "calibration.safetensors"
GATE_EXIT_CODE = 1
# Requests of other seeds than those of `bench accuracy`, which judges the model that the plan leads to.
_SEED_OFFSET = 1


class Study:
    """Runs a model with any of its parts in fp8 on the requests of a workload."""

    def __init__(self, model: ModelFolder, calibration: Workload, workload: Workload, norm: float) -> None:
        from hstu_trt.export.build import build_ranking_model
        from hstu_trt.export.calibration import largest_values
        from hstu_trt.export.quantise import fp8_modules
        from hstu_trt.export.sources import exported_checkpoint
        from hstu_trt.export.stages import EmbeddingStage
        from hstu_trt.export.tables import table_rows

        config, self._norm = model.ranking_config, norm
        self._model = build_ranking_model(config, exported_checkpoint(model.path).dense, str(model.path), "fp32")
        spec, rows = model.specs["embedding_lookup"], table_rows(model.tables)
        self._lookup = EmbeddingStage(spec, config, rows, "float32")
        self._feeds, self._workload, self._config = list(self._packed(model, workload)), workload, config
        largest = largest_values(self._model, self._lookup, self._packed(model, calibration))
        self._modules = fp8_modules(self._model, largest)
        self.share = _shares(config, workload, self._model)
        self.reference = self.scores(())

    def _packed(self, model: ModelFolder, workload: Workload) -> Iterator[Tensors]:
        config = model.ranking_config
        for rows in user_batches(workload, model.limits):
            packed = pack_request(config, *workload.batch(config, rows))
            yield {**packed, NORM: norm_tensor(self._norm, config, packed)}

    @property
    def sites(self) -> tuple[str, ...]:
        """The parts that can be in fp8."""
        return tuple(self._modules)

    def scores(self, sites: Iterable[str]) -> NDArray:
        """Scores float64 [candidates, tasks] with some parts in fp8 and the others in fp32."""
        import torch

        from hstu_trt.export.calibration import scores
        from hstu_trt.export.quantise import borrowed

        modules = {name: module for site in sites for name, module in self._modules[site].items()}
        with torch.inference_mode(), borrowed(self._model, modules):
            parts = [part.numpy() for part in scores(self._model, self._lookup, self._feeds)]
        return np.concatenate(parts).astype(np.float64)

    def trial(self, name: str, sites: Sequence[str], gates: RankingGates) -> Trial:
        """Judges some parts in fp8 by the gates."""
        found = self.scores(sites)
        worst: dict[str, Figure] = {}
        for number, task in enumerate(self._config.tasks):
            reference = self.reference[:, number]
            offsets = self._workload.cand_off
            scores = Scores(p=found[:, number], reference=reference, labels=reference, offsets=offsets)
            for figure in task_figures(scores, task, "fp8", gates):
                if figure.gate is not None:
                    worst[figure.name] = _worse(worst.get(figure.name), figure)
        share = sum(self.share[site] for site in sites)
        return Trial(name=name, sites=tuple(sites), share=share, figures=tuple(worst.values()))


def _worse(a: Figure | None, b: Figure) -> Figure:
    if a is None:
        return b
    return min(a, b, key=lambda f: f.value) if b.at_least else max(a, b, key=lambda f: f.value)


def _shares(config: HstuConfig, workload: Workload, model: object) -> dict[str, float]:
    """Each part's share of the multiplications on a workload."""
    from hstu_trt.export.quantise import parts_of

    history, candidates = workload.history_lengths.astype(float), workload.candidate_counts.astype(float)
    prefix = history + len(config.contextual_slots)
    tokens, items = float((prefix + candidates).sum()), float(candidates.sum())
    per_pair = config.heads * (config.qk_dim + config.v_dim)
    candidate_pairs = float((candidates * (prefix + 1)).sum())
    all_pairs = candidate_pairs + float((prefix * (prefix + 1) / 2).sum())
    last = f"stu.{config.layers - 1}."
    macs = {}
    for site, parts in parts_of(model).items():  # type: ignore[arg-type]
        if site.endswith(".attention"):
            macs[site] = per_pair * (candidate_pairs if site.startswith(last) else all_pairs)
            continue
        candidates_only = not site.startswith(("stu.", "preprocessor.")) or site == f"{last}output"
        macs[site] = (items if candidates_only else tokens) * sum(part.values()[0].numel() for part in parts)
    total = sum(macs.values())
    return {site: value / total for site, value in macs.items()}


def main(argv: Sequence[str]) -> int:
    """Calibrates, measures, chooses; writes the plan and the calibration requests for export."""
    args = _parser().parse_args(argv)
    model = read_model_folder(args.model)
    if model.precision == "fp8":
        raise ArtefactError(f"{args.model} is in fp8 already; plan with the model's fp32 folder")
    config = model.ranking_config
    norm = parse_attention_norm(args.attention_norm, config)
    if norm is None:
        raise ConfigError("bench plan-precision uses one N for all requests: give --attention-norm fixed:<N>")
    calibration, workload = _workloads(args, model)
    gates = _gates(args)
    study = Study(model, calibration, workload, norm)
    alone, steps = choose(study, gates, _counter(3 * len(study.sites) - 1))
    chosen = steps[-1]
    write_features(args.out / CALIBRATION_FILE, *calibration.batch(config, range(len(calibration))))
    plan = Fp8Plan(model=model.name, fp8=chosen.sites, figures=tuple(facts(trial) for trial in (*alone, *steps)))
    plan.save(args.out / PLAN_FILE, shlex.join(["hstu-trt", "bench", "plan-precision", *argv]))
    _report(args, alone, steps, study)
    return 0 if chosen.within else GATE_EXIT_CODE


def _workloads(args: argparse.Namespace, model: ModelFolder) -> tuple[Workload, Workload]:
    """Requests to calibrate with and requests to measure on: the first and the rest of one workload."""
    profile = PROFILES[args.profile]()
    count = args.calibration_requests + args.requests
    profile = dataclasses.replace(profile, requests=count)
    whole = generate(profile, model.ranking_config, seed=args.seed + _SEED_OFFSET, limits=model.limits)
    mixed = np.random.default_rng(args.seed).permutation(len(whole))
    if len(whole) < 2:
        raise ConfigError("the workload needs a request to calibrate with and one to measure on")
    cut = max(1, len(whole) * args.calibration_requests // count)
    return whole.take(mixed[:cut]), whole.take(mixed[cut:])


def _gates(args: argparse.Namespace) -> RankingGates:
    return dataclasses.replace(
        RANKING_GATES,
        entropy_change=args.max_entropy_change,
        request_entropy=args.max_entropy_change,
        accuracy_ratio=args.min_accuracy_ratio,
        gauc_ratio=args.min_gauc_ratio,
    )


def _counter(most: int) -> Progress:
    done = 0

    def progress(text: str) -> None:
        nonlocal done
        done += 1
        print(f"plan-precision: {done} of at most {most}: {text}", file=sys.stderr, flush=True)

    return progress


def _report(args: argparse.Namespace, alone: Sequence[Trial], steps: Sequence[Trial], study: Study) -> None:
    chosen = steps[-1]
    half = [site for site in study.sites if site not in chosen.sites]
    if args.json:
        print(json.dumps({"fp8": chosen.sites, "fp16": half, "trials": [facts(t) for t in (*alone, *steps)]}))
        return
    print(f"each part alone in fp8, the rest in fp32:\n{table(alone)}\n\nthe choice, step by step:\n{table(steps)}\n")
    print(f"in fp8: {', '.join(chosen.sites) or 'nothing'}   ({100 * chosen.share:.1f} % of the multiplications)")
    print(f"in fp16: {', '.join(half) or 'nothing'}")
    print(f"wrote {args.out / PLAN_FILE} and {args.out / CALIBRATION_FILE}")


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("plan-precision", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="exported model in fp32")
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="workload (default ci)")
    parser.add_argument("--requests", type=count, default=128, help="to measure on (%(default)s)")
    parser.add_argument("--calibration-requests", type=count, default=64, help="to calibrate with (%(default)s)")
    parser.add_argument("--seed", type=whole, default=DEFAULT_SEED, help="(default: %(default)s)")
    parser.add_argument("--attention-norm", help="fixed:<N> (default: the config's max_seq_len)")
    budget, gates = parser.add_argument_group("budget (default: the gates of bench accuracy)"), RANKING_GATES
    for name, default, text in (
        ("--max-entropy-change", gates.entropy_change, "|relative change| of the normalised entropy"),
        ("--min-accuracy-ratio", gates.accuracy_ratio, "accuracy at 0.5 as a share of fp32's"),
        ("--min-gauc-ratio", gates.gauc_ratio, "mean AUC per request as a share of fp32's"),
    ):
        budget.add_argument(name, type=not_negative, default=default, help=f"{text} (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help=f"for {PLAN_FILE} and {CALIBRATION_FILE}")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser
