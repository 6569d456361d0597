"""The two sides of a comparison: a runner each, all its stages behind one feed, and how far they may lie apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hstu_trt.bench.chain import Chain, Composed, Fused, open_runner
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import TAPS, ModelFolder
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.runner import Runner
from hstu_trt.contract.split_users import TAP_PREFIX
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, STAGES, Precision, float_dtype

FUSED_PREDS = "ranking_fused.preds"
PARTS = ("layers", "fused")
"""What is compared beside the three stages."""
_COARSENESS: tuple[Precision, ...] = ("fp32", "fp16", "fp8")


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two runners."""

    runner: str
    """``torch``, ``torch:cuda``, ``cuda``, ``onnxruntime``, ``tensorrt`` or ``tensorrt_rtx``."""
    model: ModelFolder
    engines: Path | None = None
    """What ``hstu-trt engines`` made; None is the folder of ``make engines``."""

    @property
    def name(self) -> str:
        """As in ``torch:cuda fp16``."""
        return f"{self.runner} {self.model.precision}"

    def open(self, parts: Sequence[str]) -> Observed:
        """The runners of this side, behind the inputs of the ``ranking`` stage."""
        chain = Chain(self.model, [self._stage(stage) for stage in STAGES])
        taps = self._stage(TAPS) if "layers" in parts else None
        fused = Fused(self.model, self._stage(FUSED)) if "fused" in parts else None
        return Observed(chain, taps, fused)

    def _stage(self, stage: str) -> Runner:
        kind, _, device = self.runner.partition(":")
        built: dict[str, Any] = {} if self.engines is None else {"engines": self.engines}
        return open_runner(kind, self.model, stage, device or None, **built)


class Observed(Composed):
    """The three stages in a row, every layer's output on the same table rows, and the fused graph beside them."""

    def __init__(self, chain: Chain, taps: Runner | None, fused: Fused | None) -> None:
        super().__init__([part for part in (chain, taps, fused) if part is not None])
        self.spec = chain.spec
        self._chain, self._taps, self._fused = chain, taps, fused

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        answers = self._chain.infer(feed)
        if self._taps is not None:
            known = {**feed, **answers}
            made = self._taps.infer({tensor.name: known[tensor.name] for tensor in self._taps.spec.inputs})
            answers |= {name: tensor for name, tensor in made.items() if name.startswith(TAP_PREFIX)}
        if self._fused is not None:
            answers[FUSED_PREDS] = self._fused.infer(feed)["preds"]
        return answers


def coarser(a: Precision, b: Precision) -> Precision:
    """The precision with the larger errors of the two."""
    return max(a, b, key=_COARSENESS.index)


def tolerances(a: Side, b: Side, parts: Sequence[str]) -> dict[str, float]:
    """Output -> largest accepted |difference|: that of the coarser precision. Raises ConfigError where it is unknown.

    Table rows of different dtypes are not judged: one side's are rounded, and what follows from it shows in the scores.
    """
    precision = coarser(a.model.precision, b.model.precision)
    stages = {"user_embeddings": "hstu", "preds": ENSEMBLE}
    if "fused" in parts:
        stages[FUSED_PREDS] = FUSED
    if "layers" in parts:
        stages |= {f"{TAP_PREFIX}{layer}.out": "stu" for layer in range(a.model.ranking_config.layers)}
    missing = sorted({stage for stage in stages.values() if (stage, precision) not in TOLERANCES})
    if missing:
        raise ConfigError(f"contract/numerics.py has no tolerance in {precision} for {', '.join(missing)}")
    found = {name: TOLERANCES[stage, precision].atol for name, stage in stages.items()}
    if float_dtype(a.model.precision) == float_dtype(b.model.precision):
        rows = [tensor.name for tensor in a.model.specs["embedding_lookup"].outputs]
        found |= dict.fromkeys(rows, 0.0)
    return found
