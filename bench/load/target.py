"""What load is sent to: a served model over gRPC, or a function in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.features import Tensors
from hstu_trt.contract.tensors import FUSED
from hstu_trt.serving.requests import one_user

INFER = "/inference.GRPCInferenceService/ModelInfer"
_CLOSE_S = 5.0
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class Answer(Protocol):
    """What a target promises: a ``concurrent.futures.Future``, or one of gRPC's, which are alike in this."""

    def add_done_callback(self, fn: Callable[[Any], None]) -> None: ...

    def exception(self) -> BaseException | None: ...

    def result(self) -> Any: ...


class Target(Protocol):
    """Where requests go. ``prepare`` is called once per request before any time is taken, ``submit`` for each sending.

    Anything with these methods can be put under load, an engine in this process too.
    """

    def prepare(self, request: Tensors) -> Any:
        """The request in the form that ``submit`` takes: inputs of ``ranking`` for one or more users."""
        ...

    def submit(self, request: Any) -> Answer:
        """Sends a prepared request, without waiting for its answer."""
        ...

    def scores(self, answer: Answer) -> NDArray:
        """The scores [candidates, tasks] of an answer. Raises what the request failed with."""
        ...

    def close(self) -> None:
        """Ends what the target holds open."""
        ...


class CallableTarget:
    """A function in this process, ``workers`` calls at a time; further requests wait in a queue."""

    def __init__(self, call: Callable[[Tensors], NDArray], *, workers: int = 1) -> None:
        self._call = call
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="target")

    def prepare(self, request: Tensors) -> Tensors:
        return request

    def submit(self, request: Tensors) -> Answer:
        return self._pool.submit(self._call, request)

    def scores(self, answer: Answer) -> NDArray:
        scores: NDArray = answer.result()
        return scores

    def close(self) -> None:
        self._pool.shutdown()


@dataclass(frozen=True, kw_only=True)
class TritonAddress:
    """A served model; opens targets in any process."""

    url: str
    """host:port of the gRPC service."""
    model: str
    timeout_s: float = 30.0

    def open(self) -> TritonTarget:
        """A connection of its own."""
        return TritonTarget(self)


class TritonTarget:
    """A model of a running Triton server over one gRPC connection, any number of requests in flight.

    Requests are serialised once, before the run, and answers are left as bytes: the client's own work per request is
    what gRPC takes.
    """

    def __init__(self, address: TritonAddress) -> None:
        import grpc

        self._address = address
        self._channel = grpc.insecure_channel(address.url, options=_UNLIMITED)
        self._infer = self._channel.unary_unary(INFER)

    def prepare(self, request: Tensors) -> bytes:
        return infer_request(self._address.model, request)

    def submit(self, request: bytes) -> Answer:
        answer: Answer = self._infer.future(request, timeout=self._address.timeout_s)
        return answer

    def scores(self, answer: Answer) -> NDArray:
        return read_scores(answer.result())

    def close(self) -> None:
        # An interrupt in the midst of a sending leaves a call in gRPC's books whose end the channel awaits without end.
        closing = threading.Thread(target=self._channel.close, daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


def infer_request(model: str, tensors: Tensors) -> bytes:
    """A serialised ``ModelInferRequest``; one user's request for ``ranking_fused`` is put into its form."""
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import np_to_triton_dtype

    message = service_pb2.ModelInferRequest(model_name=model)
    for name, array in (one_user(tensors) if model == FUSED else tensors).items():
        message.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
        message.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    return bytes(message.SerializeToString())


def read_scores(answer: bytes) -> NDArray:
    """Output ``preds`` of a serialised ``ModelInferResponse``, float32 [candidates, tasks]."""
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferResponse.FromString(answer)
    names = [output.name for output in message.outputs]
    at = names.index("preds")
    scores = np.frombuffer(message.raw_output_contents[at], dtype=np.float32)
    return scores.reshape(-1, message.outputs[at].shape[-1])


def ask_all(target: Target, requests: Sequence[Tensors], *, in_flight: int = 4) -> list[NDArray]:
    """The scores of every request, in order."""
    prepared = [target.prepare(request) for request in requests]
    scores: list[NDArray] = []
    for first in range(0, len(prepared), in_flight):
        answers = [target.submit(request) for request in prepared[first : first + in_flight]]
        scores += [target.scores(answer) for answer in answers]
    return scores
