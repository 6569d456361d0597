"""What the records of a load run say: latency, rates, and whether the run may be believed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.load.client import Records

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9}
SATURATED, UNSTABLE, SHORT, ERRORS, BEHIND = "saturated client", "unstable queue", "too short", "errors", "behind"
SHED = "shed load"
_TAIL = 10
"""A percentile rests on at least this many requests beyond it."""
_LAG_S, _LAG_SHARE = 0.002, 0.2
_BUSY_CLIENT = 0.9
_BEHIND = 0.97
_GROWTH = 0.05


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """One run. Latencies in ms; in an open loop from the moment a request was due."""

    requests: int
    seconds: float
    """From the first request until the last answer."""
    per_s: float
    """Answers per second, without those that failed or were refused."""
    requested_per_s: float | None
    """What the schedule asked for; None in a closed loop."""
    sent_per_s: float
    latency_ms: Mapping[str, float]
    """min, mean, the percentiles, max. Empty if nothing was answered."""
    send_lag_ms: float
    """p99 of how late requests were sent."""
    client_cpu: float
    """Share of one CPU per client process."""
    shed: int
    """Requests that the server refused at once; not among ``errors``."""
    errors: Mapping[str, int]
    flags: tuple[str, ...]
    """Why the run should not be believed; empty: it may."""

    def at(self, percentile: float) -> float:
        """A latency percentile among PERCENTILES, infinite if nothing was answered."""
        return self.latency_ms.get(f"p{percentile:g}", float("inf"))

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "requests": self.requests,
            "seconds": round(self.seconds, 3),
            "per_s": round(self.per_s, 3),
            "requested_per_s": None if self.requested_per_s is None else round(self.requested_per_s, 3),
            "sent_per_s": round(self.sent_per_s, 3),
            "latency_ms": {name: round(value, 4) for name, value in self.latency_ms.items()},
            "send_lag_p99_ms": round(self.send_lag_ms, 3),
            "client_cpu": round(self.client_cpu, 3),
            "shed": self.shed,
            "errors": dict(self.errors),
            "flags": list(self.flags),
        }


def summarise(
    records: Records, *, requested_per_s: float | None = None, percentile: float = 99.0, processes: int = 1
) -> LoadResult:
    """Figures and flags of a run.

    percentile: the one that the run is for; with fewer than 10 requests beyond it the run is too short.
    """
    answered = ~np.isnan(records.done)
    good = answered.copy()
    good[list(records.errors)] = False
    seconds = float(np.nanmax(records.done, initial=records.sent[-1]) - records.due[0])
    latency = 1e3 * (records.done - records.due)[good]
    lag = records.sent - records.due
    sending = float(records.sent[-1] - records.due[0])
    sent_per_s = (len(records) - 1) / sending if sending > 0 else 0.0
    cpu = records.cpu_s / seconds / processes if seconds > 0 else 0.0
    figures = _latency_figures(latency)
    shed = set(records.shed)
    errors = Counter(text for at, text in records.errors.items() if at not in shed)
    lag_s = float(np.percentile(lag, 99))
    is_open = requested_per_s is not None
    wrong = {
        SATURATED: lag_s > max(_LAG_S, _LAG_SHARE * figures.get("p99", 0.0) / 1e3) or cpu > _BUSY_CLIENT,
        UNSTABLE: records.cut_short or (is_open and queue_grows(records)),
        SHORT: len(records) * (1 - percentile / 100) < _TAIL,
        SHED: bool(shed),
        ERRORS: bool(errors),
        BEHIND: is_open and not records.cut_short and sent_per_s < _BEHIND * _scheduled(records),
    }
    return LoadResult(
        requests=len(records),
        seconds=seconds,
        per_s=float(good.sum()) / seconds if seconds > 0 else 0.0,
        requested_per_s=requested_per_s,
        sent_per_s=sent_per_s,
        latency_ms=figures,
        send_lag_ms=1e3 * lag_s,
        client_cpu=cpu,
        shed=len(shed),
        errors=errors,
        flags=tuple(flag for flag, is_so in wrong.items() if is_so),
    )


def _latency_figures(latency: NDArray) -> dict[str, float]:
    if not latency.size:
        return {}
    percentiles = np.percentile(latency, list(PERCENTILES.values()))
    named = dict(zip(PERCENTILES, map(float, percentiles), strict=True))
    return {"min": float(latency.min()), "mean": float(latency.mean()), **named, "max": float(latency.max())}


def _scheduled(records: Records) -> float:
    """Requests per second that were due: a Poisson draw is not exactly its rate."""
    span = float(records.due[-1] - records.due[0])
    return (len(records) - 1) / span if span > 0 else 0.0


def queue_grows(records: Records) -> bool:
    """Whether the number of waiting requests rises from the second to the last quarter of the run.

    A full queue is a matter of latency; a growing one has no steady state, and its latencies depend on the run's
    length. It counts as growing by 5 % of the requests between, and beyond what the queue fluctuates.
    """
    waiting = waiting_at_send(records)
    quarter = len(waiting) // 4
    if quarter < _TAIL:
        return False
    second, last = float(waiting[quarter : 2 * quarter].mean()), float(waiting[-quarter:].mean())
    growth = last - second
    return growth > _GROWTH * 2 * quarter and growth > 3.0 + 3.0 * second**0.5


def waiting_at_send(records: Records) -> NDArray:
    """How many requests were due and not yet answered when each was due, int64 [requests]."""
    due = np.sort(records.due)
    done = np.sort(np.where(np.isnan(records.done), np.inf, records.done))
    waiting: NDArray = np.arange(len(due)) - np.searchsorted(done, due, side="right")
    return waiting


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Several runs of one setting."""

    runs: Sequence[LoadResult]

    @property
    def middle(self) -> LoadResult:
        """The run with the median of p99 (of two in the middle, the worse one)."""
        ordered = sorted(self.runs, key=lambda run: run.at(99.0))
        return ordered[len(ordered) // 2]

    @property
    def flags(self) -> list[str]:
        """Flags of any run."""
        return sorted({flag for run in self.runs for flag in run.flags})

    def median(self, name: str) -> float:
        """Median over the runs of ``per_s``, or of a latency figure over those in which a request was answered."""
        return statistics.median(self._values(name))

    def spread(self, name: str) -> float:
        """Largest less smallest, as a share of the median."""
        values = self._values(name)
        middle = statistics.median(values)
        return (max(values) - min(values)) / middle if middle else 0.0

    def _values(self, name: str) -> list[float]:
        if name == "per_s":
            return [run.per_s for run in self.runs]
        return [run.latency_ms[name] for run in self.runs if run.latency_ms] or [float("inf")]
