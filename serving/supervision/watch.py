"""Watching one running server: its processes, the tables that they map, and canary requests through both served models.

What is slow is not broken. A canary without an answer is a fault only where the step that it waits for has finished
nothing since, and the process of that step did nothing either: a long request computes, a queue moves on; what does
neither hangs. A step that computes and finishes nothing is given ``Patience.stuck_s``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tritonclient.utils import InferenceServerException

from hstu_trt.contract.tensors import FUSED, STAGES
from hstu_trt.serving.supervision.canary import DEADLINE_S, Canary, Reading, Sent, Verdict
from hstu_trt.serving.supervision.mapped_files import MappedFiles
from hstu_trt.serving.supervision.processes import SERVER, Watched, processes_of
from hstu_trt.serving.tls import ClientTls, connect

LOOK_S = 0.1
_STATISTICS_TIMEOUT_S = 0.3
# An answer is so late that it is worth asking what the steps are at.
_SLOW_S = 0.2
# Longer between two looks, and it was us who stood still: nothing follows from what seems to have stood still too.
_MISSED_S = 1.0

Counts = Mapping[str, int]
"""Requests that each model has answered well since the server started."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How soon the watch says that something is broken."""

    every_s: float = 0.5
    """Between two canaries of a model."""
    idle_s: float = DEADLINE_S
    """A step that owes an answer, finishes nothing and does nothing for so long hangs."""
    stuck_s: float = 60.0
    """A step that computes, but finishes nothing, for so long is stuck."""


@dataclass
class _Waiting:
    """Since when a canary of a model lacks an answer, and how far requests have come since."""

    counts: Counts | None
    since: float
    reached: list[float] = field(default_factory=list)
    """Since when each step, the first ones first, may have what it owes."""

    def __post_init__(self) -> None:
        self.reached.append(self.since)

    def slowest(self, steps: Sequence[str], counts: Counts, now: float) -> int | None:
        """The first step that has finished nothing since; None: all move on."""
        before = self.counts or counts
        still = [index for index, step in enumerate(steps) if counts.get(step, 0) == before.get(step, 0)]
        if not still:
            return None
        self.reached += [now] * (still[0] + 1 - len(self.reached))
        return still[0]


class Pulse:
    """The canaries of one model, one after the other."""

    def __init__(self, canary: Canary, processes: Sequence[Watched], patience: Patience) -> None:
        self._canary, self._patience = canary, patience
        self._steps = (FUSED,) if canary.model == FUSED else STAGES
        self._server = [process for process in processes if process.name == SERVER]
        # A TensorRT plan has no process of its own: it runs in the server.
        self._places = [[p for p in processes if p.name == step] or self._server for step in self._steps]
        self._sent: Sent | None = None
        self._waiting: _Waiting | None = None
        self._due, self._failures = time.monotonic(), 0
        self.right = 0
        """Canaries that were answered."""

    def look(self, counts: Callable[[], Counts | None]) -> str | None:
        """Sends a canary when one is due, and says what is wrong with those that were sent; None: nothing."""
        now = time.monotonic()
        reading = None if self._sent is None else self._sent.reading
        if reading is not None:
            self._sent = None
            if (fault := self._take(reading, now)) is not None:
                return fault
        if self._sent is None and now >= self._due:
            if self._waiting is None:
                self._waiting = _Waiting(counts(), now)
            self._sent = self._canary.send(2 * self._patience.stuck_s)
        if self._waiting is None or now - self._waiting.since < _SLOW_S:
            return None
        return self._judge_silence(self._waiting, counts(), now)

    def close(self) -> None:
        """Takes back what is on its way."""
        if self._sent is not None:
            self._sent.cancel()
            self._sent = None

    def start_over(self) -> None:
        """Forgets for how long nothing was answered."""
        self.close()
        self._waiting, self._due = None, time.monotonic()

    def _take(self, reading: Reading, now: float) -> str | None:
        self._due = now + self._patience.every_s
        if reading.verdict.is_healthy:
            self._failures = 0
            if reading.verdict is not Verdict.SHED:
                self._waiting = None
                self.right += 1
            return None
        self._waiting, self._due = None, now  # once more before it is believed
        self._failures += 1
        if self._failures < 2:
            return None
        if reading.verdict is Verdict.WRONG:
            self._canary.forget()  # the next server begins with verified files: its answer is the right one
        return f"canary of {reading}"

    def _judge_silence(self, waiting: _Waiting, counts: Counts | None, now: float) -> str | None:
        if counts is None:
            name, suspects, since = SERVER, self._server, waiting.since
        else:
            slowest = waiting.slowest(self._steps, counts, now)
            if slowest is None:
                if now - waiting.since >= self._patience.idle_s:
                    self.start_over()  # a queue moves on, and the canary waits its turn
                return None
            name, suspects, since = self._steps[slowest], self._places[slowest], waiting.reached[slowest]
        silence = f"no answer to a request to {self._canary.model} for {now - waiting.since:.1f} s"
        if now - max([since, *(process.active_at for process in suspects)]) >= self._patience.idle_s:
            return f"{name} hangs: {silence}"
        return f"{name} is stuck: {silence}" if now - since >= self._patience.stuck_s else None


class Watch:
    """A running server: ``look`` every ``LOOK_S``. A context manager."""

    def __init__(
        self, url: str, server: int, canaries: Sequence[Canary], patience: Patience, tls: ClientTls | None = None
    ) -> None:
        self._processes = processes_of(server)
        self._pulses = [Pulse(canary, self._processes, patience) for canary in canaries]
        self._client = connect(url, tls)
        self._files = MappedFiles(process.pid for process in self._processes)
        self._looked_at = time.monotonic()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        for pulse in self._pulses:
            pulse.close()
        self._client.close()

    @property
    def right(self) -> int:
        """Canaries that were answered, of the model that answered fewest."""
        return min(pulse.right for pulse in self._pulses)

    def look(self) -> str | None:
        """What is wrong with the server; None: nothing."""
        for process in self._processes:
            if (trouble := process.look()) is not None:
                return f"{process} {trouble}"
        if (overwritten := self._files.look()) is not None:
            return f"{overwritten} was overwritten while its rows were served"
        now = time.monotonic()
        if now - self._looked_at > _MISSED_S:
            for pulse in self._pulses:
                pulse.start_over()
        for pulse in self._pulses:
            if (trouble := pulse.look(self._counts)) is not None:
                return trouble
        self._looked_at = time.monotonic()
        return None

    def _counts(self) -> Counts | None:
        """None where the server does not say."""
        try:
            answer = self._client.get_inference_statistics(client_timeout=_STATISTICS_TIMEOUT_S)
        except InferenceServerException:
            return None
        return {model.name: model.inference_stats.success.count for model in answer.model_stats}
