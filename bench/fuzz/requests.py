"""Requests of the fuzzer: valid ones to begin with, and what a message says, read as Triton should read it."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2 as protocol

from hstu_trt.bench.fuzz.oracle import Oracle
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.tensors import FUSED
from hstu_trt.serving.requests import RankRequest, one_user, pack, sample
from hstu_trt.serving.signature import Port, Signature

INFER = "/inference.GRPCInferenceService/ModelInfer"
BASES = 12
"""Valid requests per model."""
_MOST_EVENTS, _MOST_ITEMS, _MOST_USERS = 6, 4, 3
_NUMPY = {"TYPE_INT64": "<i8", "TYPE_INT32": "<i4", "TYPE_FP32": "<f4", "TYPE_FP16": "<f2"}
_CONTENTS = {
    "TYPE_INT64": "int64_contents", "TYPE_INT32": "int_contents", "TYPE_FP32": "fp32_contents",
    "TYPE_STRING": "bytes_contents",
}  # fmt: skip
# Servers before 2026 read 32 bits of the batch dim, and answer what then fits the data: one user, in all bases.
_MOST_DIM = 2**31
_VERSION_1 = re.compile(r"\s*\+?0*1(?!\d)")  # as strtol reads it


def triton_type(data_type: str) -> str:
    """A type of config.pbtxt as requests name it."""
    return "BYTES" if data_type == "TYPE_STRING" else data_type.removeprefix("TYPE_")


def message(model: str, signature: Signature, tensors: Mapping[str, NDArray]) -> Any:
    """A ModelInferRequest with raw contents."""
    request = protocol.ModelInferRequest(model_name=model)
    for port in signature.inputs:
        array = tensors[port.name]
        request.inputs.add(name=port.name, datatype=triton_type(port.data_type), shape=array.shape)
        request.raw_input_contents.append(_raw(port, array))
    return request


def _raw(port: Port, array: NDArray) -> bytes:
    if port.data_type == "TYPE_STRING":
        return b"".join(struct.pack("<I", len(text)) + text for text in array.ravel().tolist())
    return bytes(np.ascontiguousarray(array, dtype=_NUMPY[port.data_type]).tobytes())


def make_bases(oracle: Oracle, signatures: Mapping[str, Signature], seed: int) -> dict[str, list[Any]]:
    """``BASES`` valid requests to every model, small ones: most time of a run is to go into mutants."""
    random = np.random.default_rng(seed)
    bases: dict[str, list[Any]] = {name: [] for name in signatures}
    for number in range(BASES):
        users = [_user(oracle, random, number) for _ in range(1 if number < 8 else random.integers(1, _MOST_USERS + 1))]
        packed = pack(oracle.config, users)
        steps = oracle.steps(packed)
        for name, signature in signatures.items():
            tensors = one_user(pack(oracle.config, users[:1])) if name == FUSED else {**packed, **steps}
            bases[name].append(message(name, signature, tensors))
    return bases


def _user(oracle: Oracle, random: np.random.Generator, number: int) -> RankRequest:
    """One user; the first one has no history and one candidate."""
    base = sample(oracle.config, oracle.model.limits, seed=int(random.integers(1 << 31)))
    events = 0 if number == 0 else int(random.integers(0, _MOST_EVENTS + 1))
    items = 1 if number == 0 else int(random.integers(1, _MOST_ITEMS + 1))

    def take(features: Mapping[str, Any], count: int) -> dict[str, NDArray]:
        size = len(next(iter(features.values())))
        chosen = random.integers(0, size, count)
        return {name: np.asarray(values)[chosen] for name, values in features.items()}

    return RankRequest(user=base.user, history=take(base.history, events), candidates=take(base.candidates, items))


def parse(body: bytes) -> Any | None:
    """The message, or None if it is none."""
    from google.protobuf.message import DecodeError

    try:
        return protocol.ModelInferRequest.FromString(body)
    except DecodeError:
        return None


def is_plain(request: Any) -> bool:
    """Whether nothing beside tensors and names asks for anything: parameters may be refused, or change an answer."""
    parts = [request, *request.inputs, *request.outputs]
    is_wrapping = any(not 0 <= size < _MOST_DIM for tensor in request.inputs for size in tensor.shape) or (
        request.model_name == FUSED and any(list(tensor.shape[:1]) == [0] for tensor in request.inputs)
    )
    return not any(part.parameters for part in parts) and len(request.id) <= 128 and not is_wrapping


def read(request: Any, signatures: Mapping[str, Signature]) -> Tensors | None:
    """The tensors of a message that fits its model; None for one that must be refused."""
    signature = signatures.get(request.model_name)
    if signature is None or (request.model_version and not _VERSION_1.match(request.model_version)):
        return None
    ports = {port.name: port for port in signature.inputs}
    outputs = {port.name for port in signature.outputs}
    if sorted(tensor.name for tensor in request.inputs) != sorted(ports):
        return None
    if any(output.name not in outputs or _is_shared(output) for output in request.outputs):
        return None
    raws = iter(request.raw_input_contents) if request.raw_input_contents else None
    tensors: Tensors = {}
    for tensor in request.inputs:
        array = _array(tensor, ports[tensor.name], signature.max_batch_size > 0, raws)
        if array is None:
            return None
        tensors[tensor.name] = array
    if signature.max_batch_size:
        users = {len(array) for array in tensors.values()}
        if len(users) != 1 or not 1 <= users.pop() <= signature.max_batch_size:
            return None
    return {name: tensors[name] for name in ports}  # the models look at them in this order


def _is_shared(part: Any) -> bool:
    return "shared_memory_region" in part.parameters


def _array(tensor: Any, port: Port, batched: bool, raws: Iterator[bytes] | None) -> NDArray | None:
    """One tensor, its contents taken from ``raws`` if there are any; None if anything about it is wrong."""
    dims = ((-1,) if batched else ()) + port.dims
    shape = tuple(tensor.shape)
    if batched and shape and not 0 < shape[0] < _MOST_DIM:
        shape = (1, *shape[1:])
    given = [field.name for field, _ in tensor.contents.ListFields()]
    if _is_shared(tensor) or tensor.datatype != triton_type(port.data_type) or len(shape) != len(dims):
        return None
    if any(size < 0 or dim not in (-1, size) for size, dim in zip(shape, dims, strict=True)):
        return None
    if raws is not None:
        raw = next(raws, None)
        return None if raw is None or given else _of_raw(raw, port, shape)
    field = _CONTENTS.get(port.data_type)
    if field is None or given not in ([], [field]):
        return None
    values = list(getattr(tensor.contents, field))
    if len(values) != math.prod(shape):
        return None
    return np.asarray(values, dtype=_NUMPY.get(port.data_type, object)).reshape(shape)


def _of_raw(raw: bytes, port: Port, shape: tuple[int, ...]) -> NDArray | None:
    if port.data_type == "TYPE_STRING":
        is_one = len(raw) >= 4 and struct.unpack_from("<I", raw)[0] == len(raw) - 4
        return np.asarray([raw[4:]], dtype=object) if is_one else None
    dtype = np.dtype(_NUMPY[port.data_type])
    size = dtype.itemsize * math.prod(shape)  # Python's integers do not wrap around
    if math.prod(max(1, dim) for dim in shape) > 2**60:  # nor do numpy's arrays, not even empty ones
        return None
    return np.frombuffer(raw, dtype).reshape(shape) if size == len(raw) else None
