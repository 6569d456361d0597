"""Queue and compute time of each served model from Triton's statistics: what a run added to them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SETTLE_S = 0.1
"""Triton counts a request after it has answered it."""
TRITON, OURS = "triton", "hstu_trt"
PARTS = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """Counters of one model since the server's start, or what a run added to them."""

    inferences: int
    executions: int
    failures: int
    ns: Mapping[str, int]
    """Part -> nanoseconds over all successful requests; ``total`` among them."""
    source: str = TRITON
    """Who counted. By Triton's statistics a model that takes requests out of its queue (``embedding_lookup``,
    ``ranking_fused``) has neither waits nor batches: they end at the hand-over. By ours its failures are shed load."""
    batches: Mapping[int, tuple[int, int]]
    """Batch size -> executions, and the nanoseconds that they held the instance: all compute parts."""

    def __sub__(self, earlier: ModelStatistics) -> ModelStatistics:
        batches = {}
        for size, (count, ns) in self.batches.items():
            before, ns_before = earlier.batches.get(size, (0, 0))
            if count > before:
                batches[size] = (count - before, ns - ns_before)
        return ModelStatistics(
            inferences=self.inferences - earlier.inferences,
            executions=self.executions - earlier.executions,
            failures=self.failures - earlier.failures,
            ns={part: ns - earlier.ns[part] for part, ns in self.ns.items()},
            batches=batches,
            source=self.source,
        )

    def facts(self) -> dict[str, Any]:
        """For JSON: milliseconds per request and part, mean batch, executions and milliseconds by batch size."""
        requests = max(1, self.inferences)
        return {
            "source": self.source,
            "inferences": self.inferences,
            "executions": self.executions,
            "failures": self.failures,
            "ms": {part: round(ns / requests / 1e6, 4) for part, ns in self.ns.items()},
            "mean_batch": round(self.inferences / self.executions, 3) if self.executions else None,
            "batches": {
                str(size): [count, round(ns / count / 1e6, 4)] for size, (count, ns) in sorted(self.batches.items())
            },
        }


Statistics = dict[str, ModelStatistics]
"""Model -> counters; Triton counts an ensemble's steps as models of their own."""


def read_statistics(url: str) -> Statistics:
    """The counters of every model of a running server."""
    import tritonclient.grpc as grpc_client

    time.sleep(_SETTLE_S)
    with grpc_client.InferenceServerClient(url) as client:
        answer = client.get_inference_statistics()
    return {model.name: _of_message(model) for model in answer.model_stats}


def _of_message(model: Any) -> ModelStatistics:
    stats = model.inference_stats
    return ModelStatistics(
        inferences=int(model.inference_count),
        executions=int(model.execution_count),
        failures=int(stats.fail.count),
        ns={part: int(getattr(stats, part).ns) for part in PARTS} | {"total": int(stats.success.ns)},
        batches={
            int(batch.batch_size): (
                int(batch.compute_infer.count),
                sum(int(getattr(batch, part).ns) for part in PARTS if part != "queue"),
            )
            for batch in model.batch_stats
        },
    )


def added(before: Statistics, after: Statistics) -> Statistics:
    """What a run added, for the models that it went through."""
    found = {name: after[name] - before[name] for name in after if name in before}
    return {name: model for name, model in found.items() if model.inferences or model.failures}
