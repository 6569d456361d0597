"""Are the scores right that come so fast? Served scores against PyTorch fp32 on the same weights and requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.accuracy.fidelity import Scores, task_figures
from hstu_trt.bench.accuracy.metrics import teacher_labels
from hstu_trt.bench.chain import NORM, Chain, norm_tensor, open_runner
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.gates import RANKING_GATES
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.tensors import ENSEMBLE, STAGES

_LABEL_SEED = 1001


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Figures of a served model, for ``ResultRow.checks``, and a sentence for each that is beyond its gate."""

    figures: dict[str, float]
    failures: tuple[str, ...]

    @property
    def text(self) -> str:
        """As in ``max |diff| 4.8e-07 of 2e-05, 9 gates kept``."""
        gates, failed = int(self.figures["gates"]), int(self.figures["gates_failed"])
        verdict = f"{gates} gates kept" if not failed else f"{failed} of {gates} gates MISSED"
        return f"max |diff| {self.figures['max_abs']:.1e} of {self.figures['max_abs_allowed']:.0e}, {verdict}"


def reference_scores(
    model: ModelFolder, requests: Sequence[Tensors], norm: float, *, device: str = "cpu"
) -> list[NDArray]:
    """PyTorch's scores [candidates, tasks] of each request.

    model: the folder of the reference, in fp32 where the served model is not.
    """
    config = model.ranking_config
    stages = [open_runner("torch", model, stage, device) for stage in STAGES]
    with Chain(model, stages) as chain:
        return [chain.infer({**request, NORM: norm_tensor(norm, config, request)})["preds"] for request in requests]


def judge(model: ModelFolder, scores: Sequence[NDArray], expected: Sequence[NDArray]) -> Checks:
    """Holds served scores against the reference's: the tolerance of their precision, and every ranking gate.

    model: the served one, whose precision decides the tolerance. scores, expected: per request [candidates, tasks].
    """
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in expected])])
    served, reference = np.concatenate(scores), np.concatenate(expected)
    tolerance = TOLERANCES[ENSEMBLE, model.tolerances]
    difference = compare("preds", served, reference)
    figures = {"max_abs": float(difference.max_abs), "max_abs_allowed": tolerance.atol}
    failures = [] if difference.passes(tolerance) else [f"{difference.text()}; tolerance {tolerance.atol:g}"]
    gates = 1
    for number, task in enumerate(model.ranking_config.tasks):
        labels = teacher_labels(reference[:, number], _LABEL_SEED + number)
        sides = Scores(p=served[:, number], reference=reference[:, number], labels=labels, offsets=offsets)
        for figure in task_figures(sides, task, model.precision, RANKING_GATES):
            if figure.gate is None:
                continue
            gates += 1
            if np.isfinite(figure.value):
                name = f"{task.name}.{figure.name}" if len(model.ranking_config.tasks) > 1 else figure.name
                figures[name] = float(figure.value)
            if not figure.passed:
                failures.append(f"task {task.name}: {figure.name} is {figure.value:.6g}, gate {figure.gate:g}")
    figures |= {"requests": float(len(expected)), "gates": float(gates), "gates_failed": float(len(failures))}
    return Checks(figures=figures, failures=tuple(failures))
