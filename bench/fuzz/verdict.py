"""Was an answer right, or a clear refusal? Everything else that a server does is a finding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as protocol

from hstu_trt.bench.fuzz.calls import CLOSED, STREAM
from hstu_trt.bench.fuzz.cases import Case
from hstu_trt.bench.fuzz.oracle import Oracle
from hstu_trt.bench.fuzz.requests import INFER, is_plain, parse, read
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.tensors import ENSEMBLE
from hstu_trt.serving.served import LOOKUP_MODELS
from hstu_trt.serving.signature import OVERLOADED

CLIENT_FAULTS = frozenset(
    {
        "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "FAILED_PRECONDITION",
        "ALREADY_EXISTS",
    }
)  # fmt: skip
UNPARSABLE = "Unable to parse request"
"""INTERNAL with these words is gRPC's own answer to bytes that are no message; no server can choose another."""
RESTRICTED = "This protocol is restricted"
"""UNAVAILABLE with these words is Triton's answer to a call that is closed."""
SHED = "shed"
"""In place of a status: refused at once since too many wait. Nothing is known of what the answer would have been."""
_SHED = re.compile(rf"(in ensemble '\w+', )?{OVERLOADED}")
_SHEDDING = (ENSEMBLE, *LOOKUP_MODELS)
_CLOSED = "Stream removed"
"""A connection on which headers were too large is closed under the other calls that are on it, all with headers."""
_DEADLOCK = "unexpected deadlock"
_GUARD = "the request holds "
_NUMPY = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4", "FP16": "<f2"}


@dataclass(frozen=True)
class Outcome:
    """What came back of a call; ``code`` is OK, a status of gRPC, or DEADLINE_EXCEEDED for none in time."""

    code: str
    details: str
    body: bytes
    seconds: float

    @property
    def status(self) -> str:
        """The code, or SHED."""
        is_shed = self.code == "UNAVAILABLE" and _SHED.match(self.details)
        return SHED if is_shed else self.code


@dataclass(frozen=True)
class Finding:
    """A case whose answer was neither right nor a clear refusal."""

    case: Case
    outcome: Outcome
    what: str


def verdict(case: Case, outcome: Outcome, oracle: Oracle) -> str | None:
    """What is wrong with an outcome, or None."""
    if case.method == STREAM and outcome.code == "OK":
        return _verdict_of_stream(case, outcome, oracle)
    if case.method != INFER:
        return _verdict_of_other(case, outcome)
    request = parse(case.body)
    if request is None:
        is_refused = outcome.code in CLIENT_FAULTS or outcome.details == UNPARSABLE
        return None if is_refused else f"bytes that are no message: {_text(outcome)}"
    if outcome.status == SHED and request.model_name in _SHEDDING:
        return None
    tensors = read(request, oracle.signatures)
    if outcome.code == "OK":
        return _verdict_of_answer(request, outcome.body, tensors, oracle)
    return _verdict_of_refusal(case, request, outcome, tensors, oracle)


def _is_clear(case: Case, outcome: Outcome) -> bool:
    """Whether a refusal has words, and a status that says that the client is at fault."""
    return (outcome.code in CLIENT_FAULTS and bool(outcome.details)) or (
        bool(case.metadata) and _CLOSED in outcome.details
    )


def _text(outcome: Outcome) -> str:
    return f"{outcome.code}: {outcome.details[:300]}"


def _is_pruned(request: Any, outcome: Outcome) -> bool:
    """Triton's ensemble loses the steps that a request without the last one's output needs, and says so."""
    wanted = [output.name for output in request.outputs]
    return request.model_name == ENSEMBLE and "preds" not in wanted and _DEADLOCK in outcome.details


def _verdict_of_other(case: Case, outcome: Outcome) -> str | None:
    is_closed = case.method.rpartition("/")[2] in CLOSED
    if outcome.code == "OK":
        return "a call that is closed was answered" if is_closed else None
    known = outcome.details == UNPARSABLE or (is_closed and RESTRICTED in outcome.details)
    # gRPC's own UNIMPLEMENTED has no words.
    is_fine = known or _is_clear(case, outcome) or outcome.code == "UNIMPLEMENTED"
    return None if is_fine else f"no clear fault of the client's: {_text(outcome)}"


def _verdict_of_stream(case: Case, outcome: Outcome, oracle: Oracle) -> str | None:
    """A stream ends with OK; the request in it gets words, or what it would get outside of one, and bytes nothing."""
    answer = protocol.ModelStreamInferResponse.FromString(outcome.body)
    if answer.error_message:
        return None
    request = parse(case.body)
    if request is None or not outcome.body:
        is_fine = request is None and not outcome.body
        return None if is_fine else f"a stream with {len(case.body)} bytes was answered with {len(outcome.body)}"
    body = answer.infer_response.SerializeToString()
    return _verdict_of_answer(request, body, read(request, oracle.signatures), oracle)


def _verdict_of_refusal(
    case: Case, request: Any, outcome: Outcome, tensors: Tensors | None, oracle: Oracle
) -> str | None:
    """A request of sound form may only be refused as the model itself refuses it, in the same words."""
    if not _is_clear(case, outcome):
        return f"no clear fault of the client's: {_text(outcome)}"
    if tensors is None or not is_plain(request) or case.metadata or _is_pruned(request, outcome):
        return None
    try:
        oracle.answer(request.model_name, tensors)
    except InputError as error:
        said = outcome.details.removeprefix(f"in ensemble {request.model_name!r}, ")
        if said.startswith((str(error), _GUARD)):
            return None
        return f"refused with {said[:200]!r}; the reason is {str(error)[:200]!r}"
    return f"refused a right request: {_text(outcome)}"


def _verdict_of_answer(request: Any, body: bytes, tensors: Tensors | None, oracle: Oracle) -> str | None:
    if tensors is None:
        return "answered a request that does not fit the model"
    answer = protocol.ModelInferResponse.FromString(body)
    try:
        expected = oracle.answer(request.model_name, tensors)
    except InputError as error:
        return f"answered, though {error}"
    wanted = {output.name for output in request.outputs}
    wanted = wanted or {port.name for port in oracle.signatures[request.model_name].outputs}
    found = {output.name for output in answer.outputs}
    if (answer.id, answer.model_name, found) != (request.id.partition("\0")[0], request.model_name, wanted):
        return f"answered {answer.model_name!r} for id {answer.id[:50]!r} with {sorted(found)}"
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        if output.name in expected and output.datatype in _NUMPY:
            values = np.frombuffer(raw, _NUMPY[output.datatype])
            wrong = _difference(values, list(output.shape), expected[output.name], oracle.atol)
            if wrong:
                return f"output {output.name!r} {wrong}"
    return None


def _difference(values: NDArray, shape: list[int], expected: NDArray, atol: float) -> str | None:
    if shape != list(expected.shape):
        return f"has shape {shape}; {list(expected.shape)} is right"
    if np.allclose(values, expected.ravel(), rtol=0, atol=atol, equal_nan=True):
        return None
    with np.errstate(all="ignore"):
        gap = np.abs(values - expected.ravel())
    at = int(np.nanargmax(gap)) if not np.isnan(gap).all() else 0
    return f"holds {values[at]} at {at}; {expected.ravel()[at]} is right"
