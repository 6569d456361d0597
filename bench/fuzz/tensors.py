"""Mutations of what tensors hold and say of themselves."""

from __future__ import annotations

import random as chance
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.serving.signature import DENSE_ID, OFFSETS, Signature

TYPES = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64")
ODD_TYPES = ("BYTES", "BF16", "", "TYPE_INT64", "int64", "\x00", "INT64 ", "FP8", "INVALID", "STRING")
INT32 = (-(2**31), -(2**31) + 1, -1, 0, 1, 2**31 - 2, 2**31 - 1)
INT64 = (-(2**63), -(2**63) + 1, -(2**32), -2, -1, 0, 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 2, 2**63 - 1)
SIZES = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 31, 33, 1000, 2**31 - 1, 2**31, 2**32, 10**10, 2**62, 2**63 - 1)
FLOATS = (np.nan, -np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45, -0.0, 1e30, 65505.0)
_NUMPY = {"INT64": "<i8", "INT32": "<i4", "FP32": "<f4", "FP16": "<f2", "FP64": "<f8"}
_MOST_COUNT = 40


def pick(random: chance.Random, request: Any, names: tuple[str, ...] = (), types: tuple[str, ...] = ()) -> int:
    """The place of one of the request's tensors: of those names or types, where it has any."""
    places = range(len(request.inputs))
    wanted = [
        place
        for place in places
        if (not names or request.inputs[place].name in names) and (not types or request.inputs[place].datatype in types)
    ]
    return random.choice(wanted or list(places))


def array_of(request: Any, place: int) -> NDArray | None:
    """A copy of a tensor's data [n], or None for strings."""
    dtype = _NUMPY.get(request.inputs[place].datatype)
    return None if dtype is None else np.frombuffer(request.raw_input_contents[place], dtype).copy()


def set_shape(tensor: Any, shape: list[int]) -> None:
    """Replaces the declared shape."""
    del tensor.shape[:]
    tensor.shape.extend(shape)


def element_type(random: chance.Random, request: Any, signature: Signature) -> None:
    """Another type: declared alone, or with data cast to it."""
    place = pick(random, request)
    tensor, array = request.inputs[place], array_of(request, place)
    name = random.choice(TYPES + ODD_TYPES)
    if array is not None and name in _NUMPY and random.random() < 0.5:
        with np.errstate(all="ignore"):
            request.raw_input_contents[place] = array.astype(_NUMPY[name]).tobytes()
    tensor.datatype = name


def shape(random: chance.Random, request: Any, signature: Signature) -> None:
    """Another shape over the same data, or over none."""
    place = pick(random, request)
    tensor = request.inputs[place]
    old = list(tensor.shape)
    new = list(old)
    axis = random.randrange(len(new))
    way = random.randrange(8)
    if way == 0:
        new[axis] = random.choice(SIZES)
    elif way == 1:
        new[axis] += random.choice((-2, -1, 1, 2))
    elif way == 2:
        new = new[::-1]
    elif way == 3:
        new.insert(axis, 1)
    elif way == 4:
        new.pop(axis)
    elif way == 5:
        new = [random.choice(SIZES) for _ in range(random.randrange(5))]
    elif way == 6:
        new += [1] * random.choice((1, 30, 300))
    else:
        new = [-size for size in new]
    set_shape(tensor, new)
    if random.random() < 0.3:
        request.raw_input_contents[place] = b""


def wrapping_shape(random: chance.Random, request: Any, signature: Signature) -> None:
    """A shape whose bytes are those of the data, or of none, modulo 2^64."""
    place = pick(random, request)
    tensor = request.inputs[place]
    dims = list(tensor.shape)
    size = {"INT64": 8, "INT32": 4, "FP32": 4, "FP16": 2}.get(tensor.datatype, 1)
    axis = random.choice([axis for axis, dim in enumerate(dims) if axis == 0 or dim > 1] or [0])
    per_item = max(1, size * int(np.prod(dims[:axis] + dims[axis + 1 :])))
    power = 1 << random.choice((31, 32, 61, 62, 63, 64))
    step = max(1, power // (per_item & -per_item))
    dims[axis] = min(2**63 - 1, step * random.choice((1, 1, 2, 3)) + random.choice((0, dims[axis])))
    set_shape(tensor, dims)
    if dims[axis] % step == 0 or random.random() < 0.2:
        request.raw_input_contents[place] = b""


def data_length(random: chance.Random, request: Any, signature: Signature) -> None:
    """Bytes cut off or added, of one tensor or all."""
    for place in range(len(request.inputs)) if random.random() < 0.2 else [pick(random, request)]:
        raw = request.raw_input_contents[place]
        cut = random.choice((0, 1, 3, 4, 7, 8, 16, 4096))
        raw = raw[: max(0, len(raw) - cut)] if random.random() < 0.5 else raw + random.randbytes(cut or 1)
        request.raw_input_contents[place] = raw


def tokens(random: chance.Random, request: Any, signature: Signature) -> None:
    """A tensor of sound shape and data, with more or fewer tokens than the others have."""
    place = pick(random, request, types=("INT64", "INT32", "FP32", "FP16"))
    tensor = request.inputs[place]
    dims = list(tensor.shape)
    dtype = np.dtype(_NUMPY.get(tensor.datatype, "<u1"))
    axis = random.randrange(len(dims))
    dims[axis] = max(0, dims[axis] + random.choice((-dims[axis], -1, 1, 2, _MOST_COUNT)))
    set_shape(tensor, dims)
    raw, count = request.raw_input_contents[place], int(np.prod(dims)) * dtype.itemsize
    request.raw_input_contents[place] = (raw * (count // max(1, len(raw)) + 1) or bytes(count))[:count]


def offsets(random: chance.Random, request: Any, signature: Signature) -> None:
    """Offsets that lie."""
    place = pick(random, request, names=OFFSETS)
    array = array_of(request, place)
    if array is None or not len(array):
        return
    at = random.randrange(len(array))
    way = random.randrange(6)
    if way == 0:
        array[at] = random.choice(INT32)
    elif way == 1:
        array = array[::-1]
    elif way == 2:
        array[at:] = array[at:] + random.choice((-1, 1, 7))
    elif way == 3:
        array = np.full_like(array, array[-1])
    elif way == 4:
        array = np.concatenate([array, array[-1:]])
        set_shape(request.inputs[place], [len(array)])
    else:
        array = np.asarray([random.choice(INT32) for _ in array], array.dtype)
    request.raw_input_contents[place] = array.astype(_NUMPY[request.inputs[place].datatype]).tobytes()


def ids(random: chance.Random, request: Any, signature: Signature) -> None:
    """Ids at the edges of int64 and of small tables, and any others."""
    place = pick(random, request, names=("uih_ids", "candidate_ids", "contextual_ids"))
    _replace(
        random, request, place, lambda: random.choice((*INT64, 2, 22, 23, 49, 50, 399, 400, random.getrandbits(62)))
    )


def payload(random: chance.Random, request: Any, signature: Signature) -> None:
    """Timestamps and actions at the edges of int64: no table holds them, so all are served."""
    names = ("uih_timestamps", "candidate_timestamps", "uih_actions")
    _replace(random, request, pick(random, request, names=names), lambda: random.choice(INT64))


def floats(random: chance.Random, request: Any, signature: Signature) -> None:
    """NaN, Inf and the edges of float32; ids where the model takes no floats."""
    places = [place for place, tensor in enumerate(request.inputs) if tensor.datatype in ("FP32", "FP16")]
    if places:
        _replace(random, request, random.choice(places), lambda: random.choice(FLOATS))
    else:
        ids(random, request, signature)


def _replace(random: chance.Random, request: Any, place: int, value: Callable[[], float]) -> None:
    """Puts drawn values in a tensor, one to all of them; integers too large for it wrap around."""
    array = array_of(request, place)
    if array is None or not len(array):
        return
    for _ in range(random.choice((1, 1, 2, len(array)))):
        at, drawn = random.randrange(len(array)), value()
        with np.errstate(all="ignore"):
            is_integer = isinstance(drawn, int)
            array[at] = np.asarray(drawn % 2**64, np.uint64).astype(array.dtype) if is_integer else drawn
    request.raw_input_contents[place] = array.tobytes()


def beyond_limits(random: chance.Random, request: Any, signature: Signature) -> None:
    """Every tensor longer by the same factor: beyond what one user, or a batch, may have."""
    times = random.choice((20, 200, 2000))
    for place, tensor in enumerate(request.inputs):
        if tensor.datatype in _NUMPY and tensor.name not in OFFSETS:
            axis = 1 if signature.max_batch_size else 0
            dims = list(tensor.shape)
            dims[axis] *= times
            set_shape(tensor, dims)
            request.raw_input_contents[place] = request.raw_input_contents[place] * times
        elif tensor.name in OFFSETS:
            scaled = np.frombuffer(request.raw_input_contents[place], "<i4") * times
            request.raw_input_contents[place] = scaled.astype("<i4").tobytes()


def strings(random: chance.Random, request: Any, signature: Signature) -> None:
    """Strings where there are any, else a tensor that says it holds some."""
    place = pick(random, request, names=(DENSE_ID,))
    tensor = request.inputs[place]
    tensor.datatype = "BYTES"
    texts = (b"", b"\x00", b"a" * 64, b"../../model", b"\xff\xfe", b"%s%n", random.randbytes(40), b"x" * 100_000)
    text = random.choice(texts)
    length = random.choice((len(text), len(text), 0, 1, 2**31, 2**32 - 1, len(text) + 1))
    raw = length.to_bytes(4, "little") + text
    request.raw_input_contents[place] = random.choice((raw, raw, raw * 2, raw[:3], b""))
    if random.random() < 0.3:
        set_shape(tensor, [random.choice((0, 1, 2, 2**62))])
