"""Which stages of a model folder have an ONNX file, the tensors of each, and what else a feed must not hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import TAPS, ModelFolder, onnx_stages
from hstu_trt.contract.tensors import Dim, StageSpec, TensorSpec, float_dtype


def engine_stages(model: ModelFolder) -> tuple[str, ...]:
    """The stages that a runner can execute, in the order of a request, the debugging stage last."""
    taps = (TAPS,) if isinstance(model.config, HstuConfig) else ()
    return (*onnx_stages(model.config), *taps)


def engine_spec(model: ModelFolder, stage: str) -> StageSpec:
    """The tensors of a stage. Raises ConfigError when the model has no such stage."""
    if stage not in engine_stages(model):
        raise ConfigError(f"{model.name} has no stage {stage!r}: choose from {', '.join(engine_stages(model))}")
    return _taps_spec(model) if stage == TAPS else model.specs[stage]


def _taps_spec(model: ModelFolder) -> StageSpec:
    """As hstu, and the output of each layer for all tokens in the split layout."""
    config, limits, hstu = model.ranking_config, model.limits, model.specs["hstu"]
    slots = len(config.contextual_slots)
    most = limits.users * slots + limits.batch_history + limits.batch_candidates
    tokens = Dim("tokens", 1, min(most, slots + limits.history + limits.candidates), most)
    taps = tuple(
        TensorSpec(f"stu.{layer}.out", float_dtype(model.precision), (tokens, config.model_dim))
        for layer in range(config.layers)
    )
    return dataclasses.replace(hstu, name=TAPS, outputs=(*hstu.outputs, *taps))


def check_feed(feed: Mapping[str, NDArray], spec: StageSpec) -> None:
    """Refuses tensors that the stage does not know: a misspelt optional one would go unnoticed. Raises InputError."""
    known = {tensor.name for tensor in spec.inputs}
    for name in feed:
        if name not in known:
            raise InputError(f"stage {spec.name} takes no tensor {name!r}; it takes {', '.join(sorted(known))}")
