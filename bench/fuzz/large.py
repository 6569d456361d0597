"""Messages of hundreds of MiB: a tensor, an id, a surplus, and zeros that were compressed to little."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hstu_trt.bench.fuzz.requests import INFER
from hstu_trt.bench.fuzz.tensors import set_shape
from hstu_trt.bench.fuzz.verdict import CLIENT_FAULTS

_ANSWER_S = 60.0
_OF_AN_ID = 8
"""The server copies an id dozens of times, so it gets a smaller one."""


@dataclass(frozen=True)
class Large:
    """One large message."""

    kind: str
    status: str
    seconds: float
    fault: str | None


def _tensor(request: Any, size: int) -> None:
    set_shape(request.inputs[0], [size // 16, 2])
    request.raw_input_contents[0] = bytes(size)


def _surplus(request: Any, size: int) -> None:
    request.raw_input_contents.append(bytes(size))


def _id(request: Any, size: int) -> None:
    request.id = "x" * (size // _OF_AN_ID)


KINDS: dict[str, tuple[Callable[[Any, int], None], bool]] = {
    "large tensor": (_tensor, False),
    "large id": (_id, False),
    "surplus, compressed": (_surplus, True),
}


def send_large(url: str, base: Any, size: int) -> list[Large]:
    """Sends one of each kind, one after another. base: a right request (``ModelInferRequest``)."""
    import grpc

    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    found = []
    with grpc.insecure_channel(url, options=options) as channel:
        call = channel.unary_unary(INFER)
        for kind, (enlarge, is_compressed) in KINDS.items():
            request = type(base)()
            request.CopyFrom(base)
            enlarge(request, size)
            began = time.monotonic()
            compression = grpc.Compression.Gzip if is_compressed else None
            try:
                call(request.SerializeToString(), timeout=_ANSWER_S, compression=compression)
                status, details = "OK", ""
            except grpc.RpcError as error:
                status, details = error.code().name, str(error.details())
            is_fine = status in CLIENT_FAULTS or status == "OK"
            fault = None if is_fine else f"{status}: {details[:200]}"
            found.append(Large(kind, status, time.monotonic() - began, fault))
    return found
