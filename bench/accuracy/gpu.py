"""``hstu-trt bench gpu-accuracy``: the ``cuda`` runner against PyTorch in fp32, on the same weights, rows and GPU.

Entropy, accuracy and GAUC over all requests, and every request's own entropy, for Gaussian and for heavy-tailed
weights. Where fp8 in the attention layers misses a gate, the planner (``bench plan-precision``) chooses which parts go
back to fp16, on requests of their own, and its choice is judged like the others. Labels are drawn from the reference's
scores: the gates check numbers, not the quality of a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench import result_rows
from hstu_trt.bench.accuracy.fidelity import Figure, Scores, task_figures
from hstu_trt.bench.accuracy.metrics import teacher_labels
from hstu_trt.bench.accuracy.plan_choice import Trial, choose
from hstu_trt.bench.arguments import count, some_of, suite_parser
from hstu_trt.bench.model.work import request_flops
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.gates import RANKING_GATES, RankingGates
from hstu_trt.contract.tensors import Precision
from hstu_trt.contract.text import text_table

if TYPE_CHECKING:
    from torch import Tensor

    from hstu_trt.bench.model.cases import ModelCase, RandomModel, Weights

SUITE = "accuracy"
GATE_EXIT_CODE = 1
WEIGHTS = {"random": False, "heavy": True}
"""Name -> whether the weights are heavy-tailed."""
PRECISIONS: tuple[Precision, ...] = ("fp16", "fp8")
_LABEL_SEED = 1001
_PLAN_REQUESTS = 256


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run judges."""

    weights: tuple[str, ...] = tuple(WEIGHTS)
    precisions: tuple[Precision, ...] = PRECISIONS
    requests: int = 4096
    device: str = "cuda"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One precision on one kind of weights."""

    variant: str
    figures: tuple[Figure, ...]
    us: float
    """Microseconds per request."""
    sites: tuple[str, ...]
    """Parts in fp8."""

    @property
    def failures(self) -> list[str]:
        """A sentence per gate that was missed."""
        return [f"{self.variant}: {f.name} is {f.value:.6g}, gate {f.gate:g}" for f in self.figures if not f.passed]


class Bench:
    """The requests of a case, and their scores by any precision. One kind of weights."""

    def __init__(self, case: ModelCase, kind: str, feeds: Sequence[Tensors], tables: dict[str, Tensor], plan: Plan):
        from hstu_trt.bench.model.cases import RandomModel

        self._case, self._kind, self._tables, self._plan = case, kind, tables, plan
        self._feeds = feeds
        self._model: RandomModel = RandomModel(case.config, heavy_tailed=WEIGHTS[kind])
        self.sites = self._model.weights("fp8").fp8_sites if "fp8" in plan.precisions else ()
        began = time.perf_counter()
        self._reference = self._fp32()
        self.reference_s = time.perf_counter() - began

    def _fp32(self) -> list[NDArray]:
        import torch

        from hstu_trt.bench.model.references import TorchModel

        torch.backends.cuda.matmul.allow_tf32 = False
        config, device = self._case.config, self._plan.device
        oracle = TorchModel(config, self._model.weights("fp32"), "fp32", self._tables, "blocked", device)
        return [oracle.scores(feed).cpu().numpy() for feed in self._feeds]

    def judge(self, precision: Precision, sites: tuple[str, ...] | None = None, name: str = "") -> Judged:
        """The gated figures of a precision, on all requests. sites: parts in fp8; None: the attention layers."""
        weights = self._model.weights(precision, sites)
        scores, us = self._scores(weights, self._feeds)
        figures = self._figures(scores, self._reference, precision, RANKING_GATES)
        variant = name or f"cuda {precision}, {self._kind} weights"
        return Judged(variant=variant, figures=figures, us=us, sites=weights.fp8_sites)

    def trial(self, name: str, sites: Sequence[str], gates: RankingGates) -> Trial:
        """Parts in fp8 on the last requests, for the planner. Its prices are by part, not by multiplications."""
        few = slice(-_PLAN_REQUESTS, None)
        scores, _ = self._scores(self._model.weights("fp8", tuple(sites)), self._feeds[few])
        figures = self._figures(scores, self._reference[few], "fp8", gates)
        gated = tuple(figure for figure in figures if figure.gate is not None)
        return Trial(name=name, sites=tuple(sites), share=len(sites) / len(self.sites), figures=gated)

    def _scores(self, weights: Weights, feeds: Sequence[Tensors]) -> tuple[list[NDArray], float]:
        from hstu_trt.engines.cuda.runner import CudaModel, CudaOptions, FusedRunner

        options = CudaOptions(device=self._plan.device)
        model = CudaModel(self._case.config, weights.dense, weights.precision, self._tables, options)
        runner = FusedRunner(model, self._case.limits)
        began = time.perf_counter()
        scores = [answer["preds"] for answer in runner.run_many(feeds)]
        return scores, (time.perf_counter() - began) * 1e6 / len(feeds)

    def _figures(
        self, scores: Sequence[NDArray], expected: Sequence[NDArray], precision: Precision, gates: RankingGates
    ) -> tuple[Figure, ...]:
        """Of the first task that has labels, with the largest difference of a score."""
        offsets = np.concatenate([[0], np.cumsum([len(part) for part in expected])])
        number, task = next((n, t) for n, t in enumerate(self._case.config.tasks) if t.kind == "binary")
        found, reference = (np.concatenate(parts)[:, number] for parts in (scores, expected))
        labels = teacher_labels(reference, _LABEL_SEED)
        sides = Scores(p=found, reference=reference, labels=labels, offsets=offsets)
        largest = Figure(name="max_abs", value=float(np.abs(found - reference).max()))
        return (*task_figures(sides, task, precision, gates), largest)


def judge_all(bench: Bench, plan: Plan) -> list[Judged]:
    """Every precision; where fp8 misses a gate, the planner's choice too, which is then what has to pass."""
    judged = []
    for precision in plan.precisions:
        judged.append(bench.judge(precision))
        _tell(f"{judged[-1].variant}: {', '.join(judged[-1].failures) or 'all gates kept'}")
        if precision == "fp8" and judged[-1].failures:
            steps = choose(bench, RANKING_GATES, lambda text: _tell(f"planner: {text}"))[1]
            judged.append(bench.judge("fp8", steps[-1].sites, f"{judged[-1].variant}, as planned"))
    return judged


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def missed(judged: Sequence[Judged]) -> list[str]:
    """What fails a run: a gate that was missed and that no planned choice keeps."""
    planned = {one.variant.removesuffix(", as planned") for one in judged if one.variant.endswith(", as planned")}
    return [text for one in judged if one.variant not in planned for text in one.failures]


def main(argv: Sequence[str]) -> int:
    """Judges, writes rows, prints a table; exit code 1 beyond a gate."""
    args = _parser().parse_args(argv)
    import torch

    from hstu_trt.bench.model.cases import device_tables, requests, select_cases

    if not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA GPU here; without one, see bench accuracy")
    device = torch.cuda.get_device_name()
    provenance = result_rows.Provenance.here(device, result_rows.cuda_versions(), args.commit)
    path = args.out or result_rows.RESULTS / f"accuracy_{result_rows.device_slug(device)}.jsonl"
    plan = Plan(weights=args.weights, precisions=args.precisions, requests=args.requests)
    failures: list[str] = []
    for case in select_cases([args.case]):
        feeds, tables = requests(case, plan.requests), device_tables(case.config, torch.device("cuda"))
        for kind in plan.weights:
            bench = Bench(case, kind, feeds, tables, plan)
            _tell(f"{kind}: {len(feeds)} requests in fp32 after {bench.reference_s:.1f} s")
            judged = judge_all(bench, plan)
            result_rows.append_rows(path, rows_of(case, judged, feeds, provenance))
            print(table(judged), flush=True)
            failures += missed(judged)
    print("\n".join(f"FAILED: {failure}" for failure in failures), file=sys.stderr)
    return GATE_EXIT_CODE if failures else 0


def rows_of(
    case: ModelCase, judged: Sequence[Judged], feeds: Sequence[Tensors], provenance: result_rows.Provenance
) -> list[result_rows.ResultRow]:
    """A row per variant: its figures, the gates that it missed, and which parts were in fp8."""
    sizes = [(len(feed["uih_timestamps"]), len(feed["candidate_timestamps"])) for feed in feeds]
    flops = float(np.mean([request_flops(case.config, *size) for size in sizes]))
    rows = []
    for one in judged:
        checks = {figure.name: figure.value for figure in one.figures if np.isfinite(figure.value)}
        checks |= {"requests": float(len(feeds)), "gates_failed": float(len(one.failures))}
        rows.append(
            result_rows.ResultRow(
                **dataclasses.asdict(provenance), suite=SUITE, case=case.name, variant=one.variant, median_us=one.us,
                spread=0.0, tflops=flops / one.us / 1e6, per_s=1e6 / one.us, checks=checks,
                details={"fp8": list(one.sites)},
            )
        )  # fmt: skip
    return rows


def table(judged: Sequence[Judged]) -> str:
    """The gated figures of each variant for people, with the largest difference of a score."""
    names = [f.name for f in judged[0].figures if f.gate is not None or f.name == "max_abs"]
    rows = []
    for one in judged:
        values = {figure.name: figure.value for figure in one.figures}
        verdict = "beyond" if one.failures else "ok"
        rows.append((one.variant, *(f"{values.get(name, float('nan')):.6g}" for name in names), verdict))
    return text_table(("variant", *names, ""), rows)


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("gpu-accuracy", __doc__)
    parser.add_argument("--case", default="dlrm_v3 stream", help="as of bench model (%(default)s)")
    parser.add_argument(
        "--weights", type=some_of(WEIGHTS, "weights"), default=tuple(WEIGHTS), help="(default: random,heavy)"
    )
    parser.add_argument(
        "--precisions", type=some_of(PRECISIONS, "precisions"), default=PRECISIONS, help="(default: fp16,fp8)"
    )
    parser.add_argument("--requests", type=count, default=4096, help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="file for the rows (default: bench/results/accuracy_<gpu>.jsonl)")
    parser.add_argument("--commit", help="of the rows, where this tree is no git checkout")
    return parser
