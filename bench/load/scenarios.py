"""The scenarios of a load run, on anything that sends loops: offline, server, single, closed, open.

offline   every request is there at once: how many per second (MLPerf calls it so, too)
server    Poisson arrivals: the highest rate at which a latency percentile stays within its bound
single    one request after the other: latency without company
closed    a given number of clients, each waiting for its answer
open      Poisson arrivals at given rates: the curve of latency over throughput
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median_high
from typing import Any, Protocol

from hstu_trt.bench.load.client import ClosedLoop, Loop, OpenLoop, Records, poisson
from hstu_trt.bench.load.stats import SATURATED, SHORT, LoadResult, Repeated, summarise
from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving.models.waiting_room import DEFAULT_PLACES

SCENARIOS = ("single", "closed", "offline", "server", "open")
_WIDEN = 1.5
_MOST_PROBES = 12
_MOST_STEPS_DOWN = 4


class Sender(Protocol):
    """Sends a loop; ``processes.Clients`` is one."""

    processes: int

    def run(self, loop: Loop) -> Records: ...


@dataclass(frozen=True, kw_only=True)
class Bound:
    """A service level: a latency percentile and what it may be."""

    ms: float
    percentile: float = 99.0

    def __post_init__(self) -> None:
        if self.ms <= 0 or f"{self.percentile:g}" not in ("50", "90", "95", "99", "99.9"):
            raise ConfigError(f"a bound needs ms > 0 and a percentile of 50, 90, 95, 99, 99.9, got {self}")

    @property
    def text(self) -> str:
        """As in ``p99 <= 80 ms``."""
        return f"p{self.percentile:g} <= {self.ms:g} ms"

    def holds(self, result: LoadResult) -> bool:
        """Whether a run is within the bound and nothing failed; a client that was saturated only errs upwards."""
        return result.at(self.percentile) <= self.ms and set(result.flags) <= {SATURATED, SHORT}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how often."""

    seconds: float = 10.0
    """Of a run that is reported."""
    probe_seconds: float = 5.0
    """Of a run of the search."""
    repeats: int = 3
    bound: Bound = field(default_factory=lambda: Bound(ms=80.0))
    in_flight: int = DEFAULT_PLACES
    """Requests in flight of the offline scenario: what may wait in front of a model. More of them are refused."""
    single_requests: int = 1000
    """As many as a p99 needs: with fewer than 10 requests beyond it a run is flagged as too short."""
    warm_up: int = 50
    tolerance: float = 0.05
    """The search ends when its bracket is this narrow."""
    seed: int = 1001

    def __post_init__(self) -> None:
        if min(self.seconds, self.probe_seconds) <= 0 or min(self.repeats, self.in_flight, self.single_requests) < 1:
            raise ConfigError("seconds, repeats, requests and requests in flight must be positive")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a scenario found under one setting."""

    scenario: str
    setting: str
    """As in ``32 in flight``."""
    repeated: Repeated
    found: dict[str, Any] = field(default_factory=dict)
    """The search of the server scenario: every probe, and the rate found."""

    @property
    def name(self) -> str:
        """As in ``open 120/s``."""
        return f"{self.scenario} {self.setting}".strip()


Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Scenarios:
    """Runs scenarios on a sender."""

    sender: Sender
    plan: Plan
    progress: Progress = print
    before_repeats: Callable[[], None] = lambda: None
    """Called before the runs of a setting, when a search is over: counters that are taken here see these runs alone."""

    def warm_up(self) -> None:
        """Lets the target allocate and compile before anything is timed."""
        self.sender.run(ClosedLoop(in_flight=4, requests=self.plan.warm_up))

    def single(self) -> Outcome:
        """One request at a time."""
        loop = ClosedLoop(in_flight=1, requests=self.plan.single_requests)
        return self._repeat("single", "", lambda _: self._closed(loop))

    def closed(self, in_flight: int) -> Outcome:
        """A fixed number in flight."""
        loop = ClosedLoop(in_flight=in_flight, seconds=self.plan.seconds)
        return self._repeat("closed", f"{in_flight} in flight", lambda _: self._closed(loop))

    def offline(self) -> Outcome:
        """As many as the target takes."""
        loop = ClosedLoop(in_flight=self.plan.in_flight, seconds=self.plan.seconds)
        return self._repeat("offline", f"{self.plan.in_flight} in flight", lambda _: self._closed(loop))

    def open(self, rate: float) -> Outcome:
        """Poisson arrivals at a rate."""
        return self._repeat("open", f"{rate:.4g}/s", lambda turn: self.at_rate(rate, self.plan.seconds, turn))

    def server(self, guess: float) -> Outcome:
        """The highest rate within the bound, and repeated runs at it.

        guess: requests per second at which the search begins. A run that is reported lasts longer than a probe and
        may miss the bound that the probe kept; the rate then goes down, by the search's tolerance first and twice as
        much each time.
        """
        plan = self.plan
        probes: list[dict[str, Any]] = []

        def probe(rate: float) -> bool:
            result = self.at_rate(rate, plan.probe_seconds, len(probes) + 100)
            kept = plan.bound.holds(result)
            probes.append({"per_s": round(rate, 3), "ms": _rounded(result.at(plan.bound.percentile)), "kept": kept})
            self.progress(f"server: {rate:.4g}/s, p{plan.bound.percentile:g} {probes[-1]['ms']} ms, kept: {kept}")
            return kept

        # One hiccup of the machine must not halve the answer, so a miss is tried again.
        rate = highest_rate(lambda rate: probe(rate) or probe(rate), guess, plan.tolerance)
        outcome = self._at_bound(rate)
        steps = 0
        while not self.kept(outcome) and steps < _MOST_STEPS_DOWN:
            rate, steps = rate * (1 - min(plan.tolerance * 2**steps, 0.5)), steps + 1
            outcome = self._at_bound(rate)
        found = {"rate": round(rate, 3), "bound": plan.bound.text, "kept": self.kept(outcome), "probes": probes}
        return dataclasses.replace(outcome, found=found)

    def kept(self, outcome: Outcome) -> bool:
        """Whether the median of the repeats (of two in the middle, the worse one) is in the bound and no run failed."""
        bound = self.plan.bound
        failed = set(outcome.repeated.flags) - {SATURATED, SHORT}
        return not failed and median_high(run.at(bound.percentile) for run in outcome.repeated.runs) <= bound.ms

    def _at_bound(self, rate: float) -> Outcome:
        text = self.plan.bound.text
        return self._repeat("server", text, lambda turn: self.at_rate(rate, self.plan.seconds, turn))

    def at_rate(self, rate: float, seconds: float, turn: int) -> LoadResult:
        """One open-loop run; ``turn`` draws other arrivals."""
        bound = self.plan.bound
        # What waits at ten times the bound will not come within it.
        most = max(200, round(10 * rate * bound.ms / 1e3))
        loop = OpenLoop(offsets_s=poisson(rate, seconds, self.plan.seed + turn), most_waiting=most)
        records = self.sender.run(loop)
        processes = self.sender.processes
        return summarise(records, requested_per_s=rate, percentile=bound.percentile, processes=processes)

    def _closed(self, loop: ClosedLoop) -> LoadResult:
        percentile, processes = self.plan.bound.percentile, self.sender.processes
        return summarise(self.sender.run(loop), percentile=percentile, processes=processes)

    def _repeat(self, scenario: str, setting: str, run: Callable[[int], LoadResult]) -> Outcome:
        runs = []
        self.before_repeats()
        for turn in range(self.plan.repeats):
            runs.append(run(turn))
            shown = f"{scenario} {setting}".strip()
            self.progress(f"{shown}: {result_text(runs[-1])}")
        return Outcome(scenario=scenario, setting=setting, repeated=Repeated(runs=runs))


def highest_rate(holds: Callable[[float], bool], guess: float, tolerance: float) -> float:
    """The highest rate at which ``holds``, within ``tolerance``: widening from the guess, then bisection by ratio.

    If even 1/1000 of the guess does not hold, that rate comes back, and a run at it will say so.
    """
    if guess <= 0:
        raise ConfigError(f"the search for a rate needs a guess > 0, got {guess:g}")
    probes = _Probes(holds)
    low, high = guess, guess * _WIDEN
    if probes.try_rate(low):
        while probes.left and probes.try_rate(high):
            low, high = high, high * _WIDEN
    else:
        while not probes.try_rate(low / _WIDEN):
            high = low = low / _WIDEN
            if low < guess / 1000:
                return low
        low, high = low / _WIDEN, low
    while probes.left and high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if probes.try_rate(middle) else (low, middle)
    return low


class _Probes:
    def __init__(self, holds: Callable[[float], bool]) -> None:
        self._holds, self.left = holds, _MOST_PROBES

    def try_rate(self, rate: float) -> bool:
        self.left -= 1
        return self._holds(rate)


def result_text(result: LoadResult) -> str:
    """A run in a line."""
    flags = f"  [{', '.join(result.flags)}]" if result.flags else ""
    return (
        f"{result.per_s:.4g}/s, p50 {result.latency_ms.get('p50', float('nan')):.4g} ms, "
        f"p99 {result.latency_ms.get('p99', float('nan')):.4g} ms, {result.requests} requests{flags}"
    )


def _rounded(value: float) -> float | None:
    return round(value, 3) if value != float("inf") else None


def sweep_rates(most: float, shares: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)) -> Iterator[float]:
    """Rates of a curve, as shares of the highest one."""
    yield from (share * most for share in shares)
