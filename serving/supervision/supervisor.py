"""The supervisor of one tritonserver: restarts what is broken, within 5 s, on the same port.

Triton never restarts a Python model whose process died, and calls it ready all the same, so a verdict comes from the
processes themselves and from canary requests (``watch.py``). A restart is of the whole server: its models share a
queue, a log and a port, and the next one begins from files whose digests were just checked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.models.held import SUPERVISOR, Board
from hstu_trt.serving.served import LOOKUPS
from hstu_trt.serving.server_process import ServerProcess
from hstu_trt.serving.stopping import uninterrupted
from hstu_trt.serving.supervision.canary import Canary
from hstu_trt.serving.supervision.watch import LOOK_S, Patience, Watch

STABLE_CANARIES = 6
"""A server that answered so many canaries of each model, over 3 s, is no longer one that has just been restarted."""
MOST_FAILURES = 6
_LONGEST_DELAY_S = 16.0


class GivenUpError(HstuTrtError):
    """The server was restarted again and again, and did not stay up."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """A line of the supervisor's log."""

    event: str
    """``fault``, ``restarted``, or ``restart_failed``."""
    cause: str
    seconds: float
    """``fault``: the server lived so long; else since the fault."""
    restarts: int
    """Successful ones, this one included."""
    pid: int | None
    """The server that runs now."""
    at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def to_json(self) -> dict[str, Any]:
        """As a line of ``--json``."""
        return asdict(self)

    def __str__(self) -> str:
        text = {
            "fault": f"fault after {self.seconds:.1f} s: {self.cause}; restarting",
            "restarted": f"restarted in {self.seconds:.1f} s after: {self.cause} (restart {self.restarts})",
            "restart_failed": f"restart failed after {self.seconds:.1f} s: {self.cause}",
        }[self.event]
        return f"{self.at} {text}"


@dataclass(kw_only=True)
class Supervisor:
    """Keeps one server running.

    launch: checks the deployment's files, starts a server that answers, and returns it; HstuTrtError: it cannot.
    """

    launch: Callable[[], ServerProcess]
    canaries: Sequence[Canary]
    tell: Callable[[Event], None]
    record: Path
    """File that holds how many restarts there were, and the last events."""
    process: ServerProcess | None
    """The server that runs, at first too; None while there is none: the one to drain at the end."""
    patience: Patience = field(default_factory=Patience)
    restarts: int = 0
    _events: list[Event] = field(default_factory=list)

    def run(self) -> None:
        """Returns never: ends by an exception from a signal, or by GivenUpError."""
        failures = 0
        while True:
            assert self.process is not None
            began = time.monotonic()
            with self._telling_models(self.process):
                cause, was_stable = self._watch(self.process)
            fault_at = time.monotonic()
            self._note("fault", cause, fault_at - began)
            self._end()
            failures = 0 if was_stable else failures + 1
            failures = self._restart(cause, fault_at, failures)

    def close(self) -> None:
        """Closes the canaries' connections."""
        for canary in self.canaries:
            canary.close()

    @contextmanager
    def _telling_models(self, process: ServerProcess) -> Iterator[None]:
        """Of a server how often it was restarted, which is what Prometheus asks them."""
        board = Board(self.record.parent, process.pid)
        board.write(SUPERVISOR, {"restarts": self.restarts})
        try:
            yield
        finally:
            board.remove(SUPERVISOR)

    def _watch(self, process: ServerProcess) -> tuple[str, bool]:
        """What went wrong, and whether the server had been well for a while."""
        with Watch(process.plan.url, process.pid, self.canaries, self.patience, process.plan.tls) as watch:
            while True:
                if process.exit_code is not None:
                    return f"tritonserver died with code {process.exit_code}", watch.right >= STABLE_CANARIES
                with uninterrupted():
                    cause = watch.look()
                if cause is not None:
                    return cause, watch.right >= STABLE_CANARIES
                time.sleep(LOOK_S)

    def _end(self) -> None:
        """Kills the server and its stubs; nobody can be sure what they would still answer."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()

    def _restart(self, cause: str, fault_at: float, failures: int) -> int:
        """Starts servers until one answers. Returns how many in a row did not stay up. Raises GivenUpError."""
        while True:
            if failures >= MOST_FAILURES:
                raise GivenUpError(f"the server did not stay up after {failures} restarts; the last fault: {cause}")
            time.sleep(delay_s(failures))
            try:
                self.process = self.launch()
            except HstuTrtError as error:
                failures, cause = failures + 1, str(error)
                self._note("restart_failed", cause, time.monotonic() - fault_at)
                continue
            self.restarts += 1
            self._note("restarted", cause, time.monotonic() - fault_at)
            return failures

    def _note(self, event: str, cause: str, seconds: float) -> None:
        pid = None if self.process is None else self.process.pid
        noted = Event(event=event, cause=cause, seconds=round(seconds, 3), restarts=self.restarts, pid=pid)
        self._events = [*self._events[-19:], noted]
        document = {"restarts": self.restarts, "events": [past.to_json() for past in self._events]}
        with suppress(OSError):  # a full disk is no reason to serve less
            write_text_atomically(self.record, json.dumps(document, indent=1) + "\n")
        with suppress(OSError):  # nor is a reader of our output that went away
            self.tell(noted)


def supervisor_of(
    deployment: Deployment, process: ServerProcess, launch: Callable[[], ServerProcess], tell: Callable[[Event], None]
) -> Supervisor:
    """A supervisor of a server of ``deployment`` that runs already."""

    def dense_in_use(model: str) -> str | None:
        running = supervisor.process
        return None if running is None else Board(deployment.run, running.pid).dense_in_use(model)

    plan = process.plan
    supervisor = Supervisor(
        launch=launch,
        canaries=[
            Canary.of(deployment, plan.url, name, partial(dense_in_use, LOOKUPS[name]), plan.tls)
            for name in deployment.served
        ],
        tell=tell,
        record=deployment.run / f"restarts-{plan.grpc_port}.json",
        process=process,
    )
    return supervisor


def delay_s(failures: int) -> float:
    """Before a restart, after so many servers in a row that did not stay up: 0, 1, 2, 4 ... s."""
    return min(_LONGEST_DELAY_S, 2.0 ** (failures - 1)) if failures else 0.0
