"""The Python models of a deployment: Triton's requests in and out of ``stages``.

In the flavour ``tensorrt``, ``hstu`` and ``mlp_head`` are plans and not among them. Runs inside tritonserver only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import triton_python_backend_utils as pb_utils

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.serving.guard import is_bounded
from hstu_trt.serving.models.front_door import response_to, size_of_packed
from hstu_trt.serving.models.handover import Handover, Turns
from hstu_trt.serving.models.live_models import LiveDense, LiveRows, Place
from hstu_trt.serving.models.live_stages import DenseLostError, LiveLookup
from hstu_trt.serving.models.stages import GuardedLookup, Stage
from hstu_trt.serving.models.triton_base import TritonModel
from hstu_trt.serving.served import LOOKUP_MODELS
from hstu_trt.serving.signature import ATTENTION_NORM, ENGINE_STEPS
from hstu_trt.tables.remote_resp import RemoteError

End = TypeVar("End", Handover, Turns)


class _StageModel(TritonModel):
    """A model that treats each request as a batch of its own."""

    _stage: Stage

    def _end_of_pipe(self, side: Callable[[Path], End], place: Place) -> End | None:
        """A side of the pipe between the steps; None where none can be made."""
        try:
            end = side(place.board.folder)
        except OSError as error:
            pb_utils.Logger.log_warn(
                f"{self._name}: only requests that wait for their rows are bounded, not those for hstu: {error}"
            )
            return None
        self._opened.callback(end.close)
        return end

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """One response per request, in order; None: they come later."""
        return self._answer_each(requests)

    def _answer_each(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            return response_to(request, self._stage.infer(self._tensors(request)))
        except (InputError, RemoteError, DenseLostError) as error:
            return self._refusal(error, request)
        except Exception as error:  # the server must live whatever a request holds
            return self._failure(error, request)


class EmbeddingLookupModel(_StageModel):
    """``embedding_lookup``; with an attention norm to hand on, it checks the whole request (``GuardedLookup``).

    Where the server bounds the requests in flight (``guard.py``), they wait in Triton's queues. Else they wait here,
    before any work; but in the flavour ``tensorrt`` nothing tells when ``hstu``, a plan, begins a request: there, only
    requests that wait for their rows are bounded.
    """

    def _load(self, model: ModelFolder) -> None:
        norm = self._parameters.get(ATTENTION_NORM)
        place = self._place(model, self._update)
        self._bounded = is_bounded(self._name)
        self._handover = None if self._bounded or norm is not None else self._end_of_pipe(Handover, place)
        rows = LiveRows(place, self._opener(), dense_is_fixed=norm is not None)
        self._live = rows.live
        lookup = LiveLookup(rows.live, model, self._id_policy(), sends_dense=norm is None)
        self._tally = lookup.tally
        self._stage = lookup if norm is None else GuardedLookup(model, lookup, parse_fixed_norm(norm))
        wait = self._handover.wait_for_room if self._handover is not None else lambda: None
        self._entrance = self._open_door(self._answer_each, size_of_packed, wait)
        self._watch(rows.watcher)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """One response per request, in order, if nobody waits; else they come later."""
        if self._bounded or (self._entrance.is_idle and (self._handover is None or self._handover.has_room)):
            return self._entrance.answer_now(requests)
        self._entrance.admit(requests)
        return None

    def _answer(self, request: Any) -> Any:
        response = super()._answer(request)
        if self._handover is not None and not response.has_error():
            self._handover.sent()
        return response


class StepModel(_StageModel):
    """``hstu`` or ``mlp_head``, with the dense weights that each request names."""

    def _load(self, model: ModelFolder) -> None:
        place = self._place(model)
        waits_here = self._name == ENGINE_STEPS[0] and not is_bounded(LOOKUP_MODELS[0])
        self._turns = self._end_of_pipe(Turns, place) if waits_here else None
        dense = LiveDense(place, self._open_step)
        self._stage = dense.stages
        self._watch(dense.watcher)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """One response per request, in order."""
        with nullcontext() if self._turns is None else self._turns.turn(len(requests)):
            return super().execute(requests)
