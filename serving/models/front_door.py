"""Where a model lets requests in, answers them later, or refuses them at once. Runs inside tritonserver only."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from hstu_trt.serving.models.waiting_room import LoadCounts, WaitingRoom
from hstu_trt.serving.signature import OVERLOADED

TURN_S = 0.002
"""How long a model with a batcher keeps Triton waiting while it works.

What comes meanwhile is handed over together: a handover per request would cost a model of the demo's size half of its
throughput. A refusal comes so much later.
"""


SizeOf = Callable[[Sequence[Any]], tuple[int, int]]
"""Requests of a batch -> their users, and their history events and candidates."""


def size_of_packed(requests: Sequence[Any]) -> tuple[int, int]:
    """Of requests to ``ranking``: one or more users each. Without contextual features a request counts as one user."""
    users = sum(_rows(request, "contextual_ids") or 1 for request in requests)
    return users, sum(_rows(request, name) for request in requests for name in ("uih_ids", "candidate_ids"))


def size_of_ragged(requests: Sequence[Any]) -> tuple[int, int]:
    """Of requests to ``ranking_fused``: one user each, in a batch dim of 1."""
    names = ("uih_timestamps", "candidate_timestamps")
    return len(requests), sum(_rows(request, name, 1) for request in requests for name in names)


def _rows(request: Any, name: str, axis: int = 0) -> int:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return 0 if tensor is None else int(tensor.shape()[axis])


class FrontDoor:
    """The waiting room of a model, with Triton's requests in it.

    answer: requests -> one response each, in order.
    """

    def __init__(
        self, answer: Callable[[Sequence[Any]], list[Any]], size: SizeOf, *,
        places: int, most_at_once: int = 1, before: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._answer, self._size, self._places = answer, size, places
        self._room = WaitingRoom(self._work, places=places, most_at_once=most_at_once, before=before)
        self.close = self._room.close
        self.linger = self._room.linger

    @property
    def is_idle(self) -> bool:
        """Whether a request could be answered right away."""
        return self._room.is_idle

    def admit(self, requests: Sequence[Any]) -> None:
        """Takes requests in, to be answered later, and refuses those that find no place."""
        for _, sender in self._room.offer([(request, request.get_response_sender()) for request in requests]):
            refuse(sender, f"{self._places} requests wait already")

    def answer_now(self, requests: Sequence[Any]) -> list[Any]:
        """The responses to requests that did not wait, counted."""
        self._room.tally.waited(0.0, len(requests))
        return self._answer_batch(requests)

    def _answer_batch(self, requests: Sequence[Any]) -> list[Any]:
        began = time.perf_counter()
        responses = self._answer(requests)
        users, tokens = self._size(requests)
        self._room.tally.batch(users=users, tokens=tokens, seconds=time.perf_counter() - began)
        return responses

    def take_counts(self) -> LoadCounts:
        """What was counted since the last call."""
        return self._room.tally.take(self._room.waiting)

    def _work(self, admitted: list[tuple[Any, Any]]) -> None:
        responses = self._answer_batch([request for request, _ in admitted])
        for (_, sender), response in zip(admitted, responses, strict=True):
            send(sender, response)


def response_to(request: Any, outputs: Mapping[str, NDArray]) -> Any:
    """A response with those of the outputs that the request asks for.

    Triton drops the others itself, but those of a response that comes later without Python's lock: the process ends.
    """
    wanted = set(request.requested_output_names())
    return pb_utils.InferenceResponse(
        [pb_utils.Tensor(name, array) for name, array in outputs.items() if name in wanted]
    )


def refuse(sender: Any, why: str) -> None:
    """Answers a request that found no place."""
    error = pb_utils.TritonError(OVERLOADED + why, pb_utils.TritonError.UNAVAILABLE)
    send(sender, pb_utils.InferenceResponse(error=error))


def send(sender: Any, response: Any) -> None:
    """The one response to a request. Raises nothing: a client that is gone must not end a thread."""
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except Exception as error:  # the others must have their answers
        pb_utils.Logger.log_error("no answer sent: " + "".join(traceback.format_exception(error)))


class Outbox:
    """Sends responses from a thread of its own, in their order.

    A send waits until Triton has taken the response over, a process switch each way without Python's lock: several
    times what it takes to make the response, in which the next can be made.
    """

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Any, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
        self._thread.start()

    def put(self, sender: Any, response: Any) -> None:
        """Hands over the one response to a request; returns at once."""
        self._waiting.put((sender, response))

    def close(self) -> None:
        """Returns when all has been sent; nothing may be put in afterwards."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while waiting := self._waiting.get():
            send(*waiting)
            del waiting  # or the last response would be held until the next comes
