"""Prometheus metrics of micro-batches, since Triton's statistics end where a request is handed to ``MicroBatches``."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb_utils

from hstu_trt.serving.micro_batches import Counts

_FAMILIES = {
    "micro_batches_total": "Micro-batches by their number of users",
    "micro_batch_tokens_total": "Tokens of micro-batches",
    "micro_batch_waited_seconds_total": "Sum over users, from the request's arrival to its micro-batch's start",
    "micro_batch_computed_seconds_total": "Sum over micro-batches, from start to scores; several may be on their way",
}


class BatchMetrics:
    """The micro-batches of one model."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._families = {
            name: pb_utils.MetricFamily(name=f"hstu_trt_{name}", description=text, kind=pb_utils.MetricFamily.COUNTER)
            for name, text in _FAMILIES.items()
        }
        self._metrics: dict[tuple[str, str], Any] = {}

    def add(self, counts: Counts) -> None:
        """Adds what was counted since the last call."""
        for users, number in counts.users.items():
            self._metric("micro_batches_total", users=str(users)).increment(number)
        self._metric("micro_batch_tokens_total").increment(counts.tokens)
        self._metric("micro_batch_waited_seconds_total").increment(counts.waited_s)
        self._metric("micro_batch_computed_seconds_total").increment(counts.computed_s)

    def _metric(self, family: str, users: str = "") -> Any:
        if (family, users) not in self._metrics:
            labels = {"model": self._model, **({"users": users} if users else {})}
            self._metrics[family, users] = self._families[family].Metric(labels=labels)
        return self._metrics[family, users]
