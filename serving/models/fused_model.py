"""``ranking_fused`` as a Python model of Triton. Runs inside tritonserver only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.serving.engine_steps import ENGINES_PARAMETER
from hstu_trt.serving.guard import is_bounded
from hstu_trt.serving.models.front_door import TURN_S, response_to, size_of_ragged
from hstu_trt.serving.models.live_models import LiveFused
from hstu_trt.serving.models.live_stages import FixedFusedStage, FusedAnswer, LiveFusedStage
from hstu_trt.serving.models.stages import FusedStage, RequestError
from hstu_trt.serving.models.triton_base import TritonModel
from hstu_trt.serving.signature import ATTENTION_NORM, ROW_STATUS, TABLES_VERSION, TIERS_PARAMETER


class FusedModel(TritonModel):
    """``ranking_fused``: all waiting requests, run as one batch."""

    def _load(self, model: ModelFolder) -> None:
        self._bounded = is_bounded(self._name)
        if ENGINES_PARAMETER in self._parameters and TIERS_PARAMETER not in self._parameters:
            norm = parse_fixed_norm(self._parameter(ATTENTION_NORM))
            engine = FusedStage(model, self._runner(model, self._name), norm, self._id_policy())
            fixed = FixedFusedStage(engine, model)
            self._stage: LiveFusedStage | FixedFusedStage = fixed
            self._tally, self._metrics = fixed.tally, self._own_metrics()
            self._metrics.in_use(fixed.serves())
            self._entrance = self._open_door(self._answer_all, size_of_ragged)
            return
        fused = LiveFused(self._place(model, self._update), self._opener(), self._open_step)
        self._live = fused.live
        self._stage = LiveFusedStage(fused.live, model, self._id_policy())
        self._tally = self._stage.tally
        self._entrance = self._open_door(self._answer_all, size_of_ragged)
        self._watch(fused.watcher)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """One response per request, in order, where the server bounds them (``guard.py``); None: they come later."""
        if self._bounded:
            return self._entrance.answer_now(requests)
        self._entrance.admit(requests)
        self._entrance.linger(TURN_S)
        return None

    def _answer_all(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        try:
            results = self._stage.answer_many([self._tensors(request) for request in requests])
            responses = [self._response(*pair) for pair in zip(results, requests, strict=True)]
        except Exception as error:  # the server must live whatever a request holds
            return [self._failure(error, request) for request in requests]
        if self._live is None and self._metrics is not None and self._tally is not None:
            # Nobody polls for tables that stay.
            self._metrics.update(self._tally, 0)
            self._metrics.load(self._entrance.take_counts())
        return responses

    def _response(self, result: FusedAnswer | RequestError, request: Any) -> Any:
        if isinstance(result, RequestError):
            return self._refusal(result, request)
        version = np.full((len(result.scores), 1), result.version.encode(), dtype=object)
        outputs = {"preds": result.scores, TABLES_VERSION: version, ROW_STATUS: result.row_status}
        return response_to(request, outputs)
