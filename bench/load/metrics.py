"""Waits and batches of models that may take requests out of Triton's queue: our metrics beside its own queue times."""

from __future__ import annotations

import re
import urllib.request
from collections import defaultdict
from dataclasses import dataclass

from hstu_trt.bench.load.triton_statistics import OURS, ModelStatistics, Statistics
from hstu_trt.serving import pbtxt
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.refresh.settings import DEFAULT_POLL_S
from hstu_trt.serving.server import LOOPBACK, choose_port

_LINE = re.compile(r"^(?:hstu_trt|nv_inference)_(\w+)\{(.*)\} (\S+)$", re.MULTILINE)
_TRITON_QUEUE = "queue_duration_us"
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_TIMEOUT_S = 10.0
_POLLS = 1.5
_SLACK_S = 0.3


@dataclass(frozen=True, kw_only=True)
class MetricsPort:
    """Where a server tells its metrics."""

    port: int
    """Of this machine."""
    settle_s: float
    """So long after a request it may take until the metrics tell it."""

    def read(self) -> Statistics:
        """Counters of the models where requests wait."""
        with urllib.request.urlopen(f"http://{LOOPBACK}:{self.port}/metrics", timeout=_TIMEOUT_S) as answer:
            return load_statistics(answer.read().decode())


def metrics_port_for(deployment: Deployment) -> MetricsPort:
    """A free port for a server of the deployment; its models bring their metrics up to date when they poll."""
    configs = pbtxt.read_repository(deployment.repository).values()
    polls = [float(pbtxt.parameter(config, "refresh_poll_seconds") or DEFAULT_POLL_S) for config in configs]
    return MetricsPort(port=choose_port(LOOPBACK, 0), settle_s=_POLLS * max(polls) + _SLACK_S)


def load_statistics(text: str) -> Statistics:
    """The same in Prometheus' text format; models that have begun nothing are left out."""
    found: defaultdict[str, dict[str, float]] = defaultdict(dict)
    batches: defaultdict[str, defaultdict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for name, words, value in _LINE.findall(text):
        labels = dict(_LABEL.findall(words))
        if name in ("batches_total", "batch_seconds_total"):
            batches[labels["model"]][int(labels["users"])][name] = float(value)
        elif name in ("begun_total", "shed_total", "waited_seconds_total", _TRITON_QUEUE):
            found[labels["model"]][name] = float(value)
    return {model: _of(counts, batches[model]) for model, counts in found.items() if counts.get("begun_total")}


def _of(counts: dict[str, float], batches: dict[int, dict[str, float]]) -> ModelStatistics:
    table = {
        users: (int(each["batches_total"]), int(1e9 * each.get("batch_seconds_total", 0.0)))
        for users, each in batches.items()
    }
    # A request computes as long as its batch does.
    waited = int(1e9 * counts["waited_seconds_total"] + 1e3 * counts.get(_TRITON_QUEUE, 0.0))
    computed = sum(users * ns for users, (_, ns) in table.items())
    return ModelStatistics(
        inferences=int(counts["begun_total"]),
        executions=sum(number for number, _ in table.values()),
        failures=int(counts.get("shed_total", 0)),
        ns={
            "queue": waited,
            "compute_input": 0,
            "compute_infer": computed,
            "compute_output": 0,
            "total": waited + computed,
        },
        batches=table,
        source=OURS,
    )
