"""Mutations of what is around the tensors: names, parameters, contents, the message's bytes, other calls, headers."""

from __future__ import annotations

import random as chance
from typing import Any

import numpy as np

from hstu_trt.bench.fuzz.tensors import data_length, ids, offsets, pick, shape, wrapping_shape
from hstu_trt.serving.signature import Signature

_SERVICE = "/inference.GRPCInferenceService/"
STREAM = _SERVICE + "ModelStreamInfer"
_HEALTH = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/")
CLOSED = (
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "RepositoryIndex", "RepositoryModelLoad",
    "RepositoryModelUnload", "TraceSetting", "LogSettings",
)  # fmt: skip
"""Calls that nobody may make."""
OPEN = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")
_UNKNOWN = ("Shutdown", "", "modelinfer", "ModelInfer/", "../ModelInfer")
_FIELDS = (
    "bool_contents", "int_contents", "int64_contents", "uint_contents", "uint64_contents", "fp32_contents",
    "fp64_contents", "bytes_contents",
)  # fmt: skip
_TYPED = {"INT64": ("int64_contents", "<i8"), "INT32": ("int_contents", "<i4"), "FP32": ("fp32_contents", "<f4")}
_PARAMETERS = (
    "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output", "unheard_of",
    "triton_enable_empty_final_response", "shared_memory_region", "headers", "", "x" * 2000,
)  # fmt: skip


def tensor_names(random: chance.Random, request: Any, signature: Signature) -> None:
    """Duplicate, missing, unknown, empty and swapped tensors."""
    way = random.randrange(6)
    place = pick(random, request)
    if way == 0:
        request.inputs.append(request.inputs[place])
        request.raw_input_contents.append(request.raw_input_contents[place])
    elif way == 1:
        for _ in range(random.randrange(1, len(request.inputs) + 1)):
            place = random.randrange(len(request.inputs))
            del request.inputs[place], request.raw_input_contents[place]
    elif way == 2:
        name = random.choice(("", "uih", "UIH_IDS", "preds", "attention_norm", "\x01", "é", "x" * 5000, "uih_ids "))
        request.inputs.add(name=name, datatype="INT64", shape=[1])
        request.raw_input_contents.append(bytes(8))
    elif way == 3:
        request.inputs[place].name = random.choice(("", "no_such", request.inputs[place].name.upper()))
    elif way == 4:
        other = pick(random, request)
        names = request.inputs[place].name, request.inputs[other].name
        request.inputs[other].name, request.inputs[place].name = names
    else:
        raws = list(zip(list(request.inputs), list(request.raw_input_contents), strict=True))
        random.shuffle(raws)
        _refill(request, raws, swapped=random.random() < 0.5)


def _refill(request: Any, pairs: list[tuple[Any, bytes]], *, swapped: bool) -> None:
    """The tensors in another order: with their data, which is still right, or without."""
    raws = list(request.raw_input_contents) if swapped else [raw for _, raw in pairs]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor, _ in pairs]
    del request.inputs[:], request.raw_input_contents[:]
    request.inputs.extend(copies)
    request.raw_input_contents.extend(raws)


def model_names(random: chance.Random, request: Any, signature: Signature) -> None:
    """Models and versions that are not there, and ids of every kind."""
    way = random.randrange(3)
    if way == 0:
        names = ("", "ranking2", "../ranking", "RANKING", "\x00", "ranking/1", "x" * 3000, "hstu", "mlp_head")
        request.model_name = random.choice(names)
    elif way == 1:
        versions = ("0", "2", "-1", "1", "01", "9" * 30, "x", "1.5", " 1", "\n", str(2**63), "-9223372036854775808")
        request.model_version = random.choice(versions)
    else:
        request.id = random.choice(("", "a", "\x00", "é", "<id_unknown>", "x" * 127, "x" * 2000, "x" * 200_000))


def outputs(random: chance.Random, request: Any, signature: Signature) -> None:
    """Some outputs, the same twice, none that there is, classes of one."""
    names = [port.name for port in signature.outputs]
    way = random.randrange(4)
    if way == 0:
        for name in random.sample(names, random.randrange(1, len(names) + 1)):
            request.outputs.add(name=name)
    elif way == 1:
        for _ in range(random.choice((2, 5, 500))):
            request.outputs.add(name=names[0])
    elif way == 2:
        request.outputs.add(name=random.choice(("", "nope", "uih_ids", "x" * 3000)))
    else:
        output = request.outputs.add(name=random.choice(names))
        count = random.choice((-(2**63), -1, 0, 1, 3, 2**31, 2**32, 2**63 - 1))
        output.parameters["classification"].int64_param = count


def contents(random: chance.Random, request: Any, signature: Signature) -> None:
    """Typed contents in place of raw ones, beside them, in the wrong field; raw ones too few or too many."""
    way = random.randrange(5)
    place = pick(random, request)
    if way == 0:
        request.raw_input_contents.append(random.randbytes(random.choice((0, 1, 8, 4096))))
    elif way == 1:
        del request.raw_input_contents[random.randrange(len(request.raw_input_contents)) :]
    elif way == 2:
        request.inputs[place].contents.int64_contents.extend([1, 2, 3])
    else:
        _to_typed(request)
        if way == 4:
            _spoil_typed(random, request.inputs[place].contents)


def _to_typed(request: Any) -> None:
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            tensor.contents.bytes_contents.append(raw[4:])
        elif tensor.datatype in _TYPED:
            field, dtype = _TYPED[tensor.datatype]
            getattr(tensor.contents, field).extend(np.frombuffer(raw, dtype).tolist())
    del request.raw_input_contents[:]


def _spoil_typed(random: chance.Random, contents: Any) -> None:
    given = [field.name for field, _ in contents.ListFields()]
    if given and random.random() < 0.5:
        values = getattr(contents, given[0])
        del values[random.randrange(len(values)) :]
    else:
        name = random.choice(_FIELDS)
        getattr(contents, name).append(b"x" if name == "bytes_contents" else 1)


def parameters(random: chance.Random, request: Any, signature: Signature) -> None:
    """Sequences, priorities, timeouts and what nobody knows, of every type."""
    for _ in range(random.choice((1, 1, 2, 100))):
        where = random.choice((request, request, request.inputs[pick(random, request)]))
        parameter = where.parameters[random.choice(_PARAMETERS) + random.choice(("", "", "_"))]
        way = random.randrange(6)
        if way == 0:
            parameter.int64_param = random.choice((-(2**63), -1, 0, 1, 2**32, 2**63 - 1))
        elif way == 1:
            parameter.bool_param = random.random() < 0.5
        elif way == 2:
            parameter.string_param = random.choice(("", "1", "x" * 129, "\x00", "é", "x" * 30_000))
        elif way == 3:
            parameter.double_param = random.choice((0.0, -1.5, 1e308, float("nan"), float("inf")))
        elif way == 4:
            parameter.uint64_param = random.choice((0, 1, 2**32, 2**64 - 1))
        else:
            parameter.SetInParent()


def shared_memory(random: chance.Random, request: Any, signature: Signature) -> None:
    """Tensors said to lie in shared memory."""
    if random.random() < 0.5:
        part: Any = request.inputs[pick(random, request)]
        if random.random() < 0.5:
            del request.raw_input_contents[0]
    else:
        part = request.outputs.add(name=signature.outputs[0].name)
    part.parameters["shared_memory_region"].string_param = random.choice(
        ("x", "", "/", "triton_python_backend", "\x00")
    )
    if random.random() < 0.8:
        part.parameters["shared_memory_byte_size"].int64_param = random.choice((-1, 0, 64, 2**40, 2**63 - 1))
    if random.random() < 0.3:
        part.parameters["shared_memory_offset"].int64_param = random.choice((-64, 0, 64, 2**63 - 1))


def protobuf(random: chance.Random, request: Any, signature: Signature) -> dict[str, Any]:
    """Bytes that are no message, or not the one that was meant."""
    body = bytearray(request.SerializeToString())
    way = random.randrange(6)
    if way == 0:
        body = bytearray(random.randbytes(random.choice((1, 2, 10, 100, 1000))))
    elif way == 1:
        del body[random.randrange(len(body)) :]
    elif way == 2:
        for _ in range(random.choice((1, 2, 8))):
            body[random.randrange(len(body))] ^= 1 << random.randrange(8)
    elif way == 3:
        at = random.randrange(len(body))
        body[at:at] = random.choice((b"\xff" * 10, b"\x0a\xff\xff\xff\xff\x0f", b"\x80" * 11, bytes(20), b"\x2b" * 200))
    elif way == 4:
        first, last = sorted(random.randrange(len(body)) for _ in range(2))
        body = body[:first] + body[last:] + body[first:last]
    else:
        body = body * 2
    return {"body": bytes(body)}


def other_calls(random: chance.Random, request: Any, signature: Signature) -> dict[str, Any]:
    """The rest of the service, what is closed of it, and what it does not have."""
    name = random.choice(random.choice((OPEN, CLOSED, CLOSED, _UNKNOWN)))
    bodies = (b"", b"\xff" * 40, b"\x0a\x07ranking", b"\x0a\x04nope", request.SerializeToString(), random.randbytes(30))
    key = (("triton-grpc-protocol-admin-key", random.choice(("", "x", "admin-key"))),)
    return {
        "method": _SERVICE + name,
        "body": random.choice(bodies),
        "metadata": key if random.random() < 0.3 else (),
    }


def streams(random: chance.Random, request: Any, signature: Signature) -> dict[str, Any]:
    """The same requests, whole or spoilt, as the one message of a stream."""
    spoil = random.choice(
        (None, wrapping_shape, shape, data_length, offsets, ids, tensor_names, outputs, contents, parameters, protobuf)
    )
    spoilt = None if spoil is None else spoil(random, request, signature)
    return {"method": STREAM, "body": spoilt["body"] if spoilt else request.SerializeToString()}


def health(random: chance.Random, request: Any, signature: Signature) -> dict[str, Any]:
    """gRPC's own question whether a service is well, which load balancers ask."""
    bodies = (b"", b"\x0a\x00", b"\x0a\x07ranking", b"\x0a\xff\xff\xff\xff\x0f", b"\xff" * 40, random.randbytes(30))
    return {"method": random.choice(_HEALTH), "body": random.choice(bodies)}


def headers(random: chance.Random, request: Any, signature: Signature) -> dict[str, Any]:
    """Headers by the thousand, long ones, and those that mean something elsewhere."""
    known = ("x-user-id", "authorization", "traceparent", "triton_grpc_error", "grpc-internal-x", "cookie", "x-bin")
    count = random.choice((1, 5, 60, 1000))
    length = random.choice((0, 1, 20, 8000 if count < 6 else 20))
    names = [random.choice(known) if place < 3 else f"x-{place}" for place in range(count)]
    pairs = [(name, "v" * length) for name in names if not name.startswith("grpc-") and not name.endswith("-bin")]
    return {"metadata": tuple(pairs)}


def compressed(random: chance.Random, request: Any, signature: Signature) -> dict[str, Any]:
    """A message that becomes much larger when it is unpacked."""
    if random.random() < 0.3:
        request.raw_input_contents.append(bytes(random.choice((10, 1 << 20))))
    return {"gzip": True}
