"""Cases of the fuzzer: from a seed and a number to a call of the server, schema-aware or of raw bytes.

Each kind takes a valid request and spoils it in one way. A mutant may still be valid, or turn out so: nothing here says
what the answer is to be, ``verdict`` does.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from hstu_trt.bench.fuzz import calls as fuzz_calls
from hstu_trt.bench.fuzz import tensors as fuzz_tensors
from hstu_trt.bench.fuzz.requests import INFER
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.serving.signature import Signature


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call."""

    number: int
    kind: str
    method: str = INFER
    body: bytes = b""
    metadata: tuple[tuple[str, str], ...] = ()
    gzip: bool = False


Mutate = Callable[[random.Random, Any, Signature], Any]
"""Changes a request in place, or returns what else to call: fields of a Case."""

KINDS: dict[str, tuple[float, Mutate]] = {
    "untouched": (1, lambda random, request, signature: None),
    "element type": (10, fuzz_tensors.element_type),
    "shape": (14, fuzz_tensors.shape),
    "shape that wraps": (6, fuzz_tensors.wrapping_shape),
    "length of data": (14, fuzz_tensors.data_length),
    "tokens disagree": (6, fuzz_tensors.tokens),
    "offsets": (8, fuzz_tensors.offsets),
    "ids": (6, fuzz_tensors.ids),
    "timestamps, actions": (1, fuzz_tensors.payload),
    "floats": (2, fuzz_tensors.floats),
    "beyond the limits": (0.2, fuzz_tensors.beyond_limits),
    "strings": (3, fuzz_tensors.strings),
    "tensor names": (8, fuzz_calls.tensor_names),
    "model, version": (4, fuzz_calls.model_names),
    "outputs": (2, fuzz_calls.outputs),
    "contents": (5, fuzz_calls.contents),
    "parameters": (2, fuzz_calls.parameters),
    "shared memory": (2, fuzz_calls.shared_memory),
    "protobuf": (13, fuzz_calls.protobuf),
    "other calls": (4, fuzz_calls.other_calls),
    "streams": (4, fuzz_calls.streams),
    "health": (1, fuzz_calls.health),
    "headers": (1, fuzz_calls.headers),
    "compressed": (0.5, fuzz_calls.compressed),
}
_NAMES, _WEIGHTS = list(KINDS), list(accumulate(weight for weight, _ in KINDS.values()))
_SHARES = {ENSEMBLE: 30, FUSED: 30, "embedding_lookup": 20, "hstu": 8, "mlp_head": 12}
"""Of the requests to each model, as far as it is served."""


def make_case(seed: int, number: int, bases: Mapping[str, list[Any]], signatures: Mapping[str, Signature]) -> Case:
    """The case of that number: the same for the same seed, whatever was made before."""
    chance = random.Random(f"{seed} {number}")
    kind = chance.choices(_NAMES, cum_weights=_WEIGHTS)[0]
    models = [name for name in _SHARES if name in bases]
    model = chance.choices(models, cum_weights=list(accumulate(_SHARES[name] for name in models)))[0]
    base = chance.choice(bases[model])
    request = type(base)()
    request.CopyFrom(base)
    other = KINDS[kind][1](chance, request, signatures[model]) or {}
    case = Case(number=number, kind=kind, body=request.SerializeToString())
    return dataclasses.replace(case, **other)
