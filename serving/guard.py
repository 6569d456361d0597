"""The guard of the server: requests that would end it, end or bloat a model process, or be too many, are refused.

``csrc/guard.cpp``, before Triton's Python backend, and ``csrc/guard_frontend.cpp``, before its library, say which those
are; ``make guard-lib`` builds both. The first goes with the server in the nvidia-pytriton wheel, which is too old to
refuse such requests itself, the second with any server, since none can bound all that waits (``waiting_room.py``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, STAGES, Dim, StageSpec
from hstu_trt.serving.served import LOOKUPS, SERVED, models_of
from hstu_trt.serving.signature import ENGINE_STEPS

LIBRARY = Path(__file__).resolve().parents[1] / "build/lib/libhstu_trt_guard.so"
FRONTEND = LIBRARY.with_name("libhstu_trt_guard_frontend.so")
BACKEND = "libtriton_python.so"
UNGUARDED = "libtriton_python_unguarded.so"
LIMITS_VARIABLE = "HSTU_TRT_GUARD"
DOORS_VARIABLE = "HSTU_TRT_DOORS"
_BUILD = "make guard-lib"
# A request somewhat beyond the limits passes, for the model to say what is wrong with it in terms of the model.
_SLACK_FACTOR, _SLACK_BYTES = 2, 65536


def guard_limits(model: ModelFolder, served: Sequence[str] = SERVED) -> str:
    """How many bytes a request to each model may hold, as ``csrc/guard.cpp`` reads it."""
    specs = model.specs
    # In one flavour embedding_lookup sees the whole request, so it may everywhere.
    stages = {"embedding_lookup": specs[ENSEMBLE], FUSED: specs[FUSED]} | {step: specs[step] for step in ENGINE_STEPS}
    stages = {name: spec for name, spec in stages.items() if name in models_of(served)}
    bounds = {name: _SLACK_FACTOR * largest_request(spec) + _SLACK_BYTES for name, spec in stages.items()}
    return " ".join(f"{name}={most}" for name, most in bounds.items())


def guard_doors(places: Mapping[str, int], flavour: str) -> str:
    """How many requests to each served model may be in flight, as ``csrc/guard_frontend.cpp`` reads it.

    places: for each of LOOKUP_MODELS that runs, how many may wait. A step of ``ranking`` works on one request at a
    time, ``ranking_fused`` on all that have waited.
    """
    doors, lookup = [], LOOKUPS[ENSEMBLE]
    if lookup in places:
        doors.append(f"{ENSEMBLE}={lookup}:{places[lookup]}+{len(STAGES)}")
    if FUSED in places and flavour != "cuda":  # where micro-batches bound themselves, by what the GPU holds
        doors.append(f"{FUSED}={FUSED}:{places[FUSED]}+{places[FUSED]}")
    return " ".join(doors)


def is_bounded(model: str) -> bool:
    """In a process of the server: whether requests to that one of LOOKUP_MODELS are counted before they come to it."""
    doors = os.environ.get(DOORS_VARIABLE, "").split()
    return any(door.partition("=")[2].partition(":")[0] == model for door in doors)


def largest_request(spec: StageSpec) -> int:
    """Bytes of the tensors of a stage's largest request."""
    return sum(
        np.dtype(tensor.dtype).itemsize * math.prod(dim.max if isinstance(dim, Dim) else dim for dim in tensor.dims)
        for tensor in spec.inputs
    )


def find_guard(address: str, loopback: str) -> Path | None:
    """The built library, or None; raises ConfigError where others could reach a server without it."""
    if LIBRARY.is_file() and _can_preload():
        return LIBRARY
    if address != loopback:
        raise ConfigError(
            f"no {LIBRARY} of this version in a path without spaces and colons: without it one malformed request ends "
            f"this server; build it with `{_BUILD}` (C++ alone) before you listen on {address!r}, or stay on {loopback}"
        )
    return None


def _can_preload() -> bool:
    # LD_PRELOAD takes " " and ":" for the end of a path. A library of an earlier build would lack some of it.
    if not FRONTEND.is_file() or any(char in str(FRONTEND) for char in " :"):
        return False
    content = FRONTEND.read_bytes()
    return all(mark in content for mark in (DOORS_VARIABLE.encode(), b"sem_clockwait"))


def guard_environment(limits: str) -> dict[str, str]:
    """Variables of a guarded server."""
    return {LIMITS_VARIABLE: limits, **_preload()}


def door_environment(doors: str) -> dict[str, str]:
    """Variables of a server that refuses what is too much; none where the library was not built."""
    return {DOORS_VARIABLE: doors, **_preload()} if _can_preload() else {}


def _preload() -> dict[str, str]:
    others = os.environ.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{FRONTEND}:{others}" if others else str(FRONTEND)}


def guard_note(environment: Mapping[str, str]) -> list[str]:
    """A line for people where the wheel's server runs without it."""
    is_bare = "LD_LIBRARY_PATH" in environment and LIMITS_VARIABLE not in environment
    return [f"  note    one malformed request can end this server: `{_BUILD}` builds its guard"] if is_bare else []
