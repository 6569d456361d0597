"""The Python models of the flavour ``cuda``. Runs inside tritonserver only.

``ranking_fused`` does not answer in ``execute``: it puts requests into ``MicroBatches`` and returns, so that Triton
hands over the next while the GPU works, and each answer goes through its request's response sender.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.engines.cuda.runner import CudaOptions
from hstu_trt.engines.cuda.staging import UserFeed
from hstu_trt.serving.cuda_steps import CudaSettings
from hstu_trt.serving.models.cuda_stages import DeviceLookup, DeviceStep, FusedRequests, OwnTables, Taken, open_fused
from hstu_trt.serving.models.front_door import Outbox, refuse, response_to, send
from hstu_trt.serving.models.micro_batches import BatchLimits, ClosedError, FullError, MicroBatches
from hstu_trt.serving.models.triton_base import TritonModel
from hstu_trt.serving.models.waiting_room import LoadCounts, queue_places
from hstu_trt.serving.signature import ATTENTION_NORM, QUEUE_PARAMETER, ROW_STATUS, TABLES_VERSION

_METRICS_EVERY_S = 1.0


class _DeviceModel(TritonModel):
    """A model with tables or weights on the device, which stay as they are."""

    def _settings(self) -> CudaSettings:
        return CudaSettings.of_parameters(self._parameters)

    def _options(self) -> CudaOptions:
        settings = self._settings()
        return CudaOptions(device=settings.device, max_tokens=settings.batch_tokens, bucket_steps=settings.bucket_steps)

    def _norm(self) -> float:
        return parse_fixed_norm(self._parameter(ATTENTION_NORM))

    def _start_metrics(self, tables: OwnTables, table_bytes: int, load: Callable[[], LoadCounts] | None = None) -> None:
        """Brings the metrics up to date once a second, until the model is unloaded.

        load: what requests were refused, waited and were run; None where Triton's own statistics tell.
        """
        self._tally, metrics = tables.tally, self._own_metrics()
        metrics.in_use(tables.serves(table_bytes))
        ended = threading.Event()

        def update() -> None:
            while not ended.wait(_METRICS_EVERY_S):
                metrics.update(tables.tally, 0)
                if load is not None:
                    metrics.load(load())

        thread = threading.Thread(target=update, name="metrics", daemon=True)
        thread.start()
        self._opened.callback(thread.join)
        self._opened.callback(ended.set)


class _OneByOne(_DeviceModel):
    """A step of ``ranking``: a request is a batch of its own, and its tensors stay on the device."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            answer = self._infer(request)
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
            return pb_utils.InferenceResponse([_tensor(name, value) for name, value in answer.items()])
        except InputError as error:
            return self._refusal(error, request)
        except Exception as error:  # the server must live whatever a request holds
            return self._failure(error, request)

    def _infer(self, request: Any) -> dict[str, Any]:
        raise NotImplementedError


class DeviceLookupModel(_OneByOne):
    """``embedding_lookup``.

    Requests to ``ranking`` wait in Triton's queues, which have no bound but the guard's (``guard.py``): without it, the
    door of ``EmbeddingLookupModel`` would need ``handover.py`` between these steps, since they wait for ``hstu``, and
    rows on the device through response senders, which nobody has tried.
    """

    def _load(self, model: ModelFolder) -> None:
        tables = OwnTables(model, self._id_policy())
        self._lookup = DeviceLookup(model, self._options(), tables, self._norm())
        self._start_metrics(tables, self._lookup.table_bytes)

    def _infer(self, request: Any) -> dict[str, Any]:
        return self._lookup.infer(self._tensors(request))


class DeviceStepModel(_OneByOne):
    """``hstu`` or ``mlp_head``."""

    def _load(self, model: ModelFolder) -> None:
        self._step = DeviceStep(model, self._name, self._options())

    def _infer(self, request: Any) -> dict[str, Any]:
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        return dict(
            self._step.infer({name: torch.utils.dlpack.from_dlpack(tensor) for name, tensor in tensors.items()})
        )


def _tensor(name: str, value: Tensor | NDArray) -> Any:
    if isinstance(value, np.ndarray):
        return pb_utils.Tensor(name, value)
    return pb_utils.Tensor.from_dlpack(name, value.contiguous())


class MicroBatchModel(_DeviceModel):
    """``ranking_fused``."""

    def _load(self, model: ModelFolder) -> None:
        settings, norm = self._settings(), self._norm()
        options, tables = self._options(), OwnTables(model, self._id_policy())
        self._requests = FusedRequests(model, tables, norm)
        self._version = np.asarray([[tables.version.encode()]], dtype=object)
        runner = open_fused(model, options, norm)
        limits = BatchLimits(
            tokens=settings.batch_tokens,
            users=options.max_users,
            places=queue_places(self._parameter(QUEUE_PARAMETER)),
            in_flight=settings.batches_in_flight,
        )
        self.outbox = Outbox()
        self._opened.callback(self.outbox.close)
        self._batches = MicroBatches(runner, limits)
        self._start_metrics(tables, runner.table_bytes, self._batches.take_counts)
        self._opened.callback(self._batches.close)

    def execute(self, requests: Sequence[Any]) -> None:
        """Returns once requests wait for their micro-batches or are refused; answers come through their senders."""
        for request in requests:
            call = _Call(self, request)
            try:
                self._batches.put(call.read, call.answer)
            except FullError as error:
                refuse(call.sender, str(error))
            except ClosedError as error:
                send(call.sender, self.error_response(request, error))

    def take(self, request: Any) -> Taken:
        """Raises InputError for a wrong request."""
        return self._requests.take(self._tensors(request))

    def response(self, request: Any, scores: list[NDArray], row_status: NDArray) -> Any:
        """``scores``: [candidates, tasks] of each user."""
        preds, versions = np.stack(scores), np.repeat(self._version, len(scores), axis=0)
        return response_to(request, {"preds": preds, TABLES_VERSION: versions, ROW_STATUS: row_status})

    def error_response(self, request: Any, error: Exception) -> Any:
        """What a client gets in place of scores."""
        return self._refusal(error, request) if isinstance(error, InputError) else self._failure(error, request)


class _Call:
    """A request on its way through the micro-batches. Holds it: the arrays lie in its shared memory."""

    def __init__(self, model: MicroBatchModel, request: Any) -> None:
        self._model, self._request = model, request
        self.sender = request.get_response_sender()
        self._row_status: NDArray = np.empty(0)

    def read(self) -> list[UserFeed]:
        """Its users. Raises InputError."""
        taken = self._model.take(self._request)
        self._row_status = taken.row_status
        return taken.users

    def answer(self, scores: list[NDArray] | Exception) -> None:
        """Has the one response sent."""
        try:
            if isinstance(scores, Exception):
                raise scores
            response = self._model.response(self._request, scores, self._row_status)
        except Exception as error:  # the server must live whatever a request holds
            response = self._model.error_response(self._request, error)
        self._model.outbox.put(self.sender, response)
