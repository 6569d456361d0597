"""The guard before Triton's Python backend: requests that would kill or bloat a model process do not reach it.

``csrc/guard.cpp`` says which those are; ``make guard-lib`` builds it. It stands before the Python backend of the
nvidia-pytriton wheel, whose server is too old to refuse them itself.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, Dim, StageSpec
from hstu_trt.serving.signature import ENGINE_STEPS

LIBRARY = Path(__file__).resolve().parents[1] / "build/lib/libhstu_trt_guard.so"
BACKEND = "libtriton_python.so"
UNGUARDED = "libtriton_python_unguarded.so"
LIMITS_VARIABLE = "HSTU_TRT_GUARD"
_BUILD = "make guard-lib"
# A request somewhat beyond the limits passes, for the model to say what is wrong with it in terms of the model.
_SLACK_FACTOR, _SLACK_BYTES = 2, 65536


def guard_environment(model: ModelFolder) -> dict[str, str]:
    """The variable that tells the guard how many bytes a request to each model may hold."""
    specs = model.specs
    # In one flavour embedding_lookup sees the whole request, so it may everywhere.
    stages = {"embedding_lookup": specs[ENSEMBLE], FUSED: specs[FUSED]} | {step: specs[step] for step in ENGINE_STEPS}
    bounds = {name: _SLACK_FACTOR * largest_request(spec) + _SLACK_BYTES for name, spec in stages.items()}
    return {LIMITS_VARIABLE: " ".join(f"{name}={most}" for name, most in bounds.items())}


def largest_request(spec: StageSpec) -> int:
    """Bytes of the tensors of a stage's largest request."""
    return sum(
        np.dtype(tensor.dtype).itemsize * math.prod(dim.max if isinstance(dim, Dim) else dim for dim in tensor.dims)
        for tensor in spec.inputs
    )


def find_guard(address: str, loopback: str) -> Path | None:
    """The built library, or None; raises ConfigError where others could reach a server without it."""
    if LIBRARY.is_file():
        return LIBRARY
    if address != loopback:
        raise ConfigError(
            f"{LIBRARY} is missing, without which one malformed request ends a model process of this tritonserver: "
            f"build it with `{_BUILD}` (C++ alone) before you listen on {address!r}, or listen on {loopback}"
        )
    return None
