"""One replica of a fleet: an ``hstu-trt serve`` as a child process, and what its canaries say of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.manifest import MANIFEST_NAME
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.fleet.gateway import children_of
from hstu_trt.serving.server import EXIT_TIMEOUT_S, LOOPBACK
from hstu_trt.serving.server_process import reap, tied_to_us
from hstu_trt.serving.supervision.canary import Canary, Reading, Verdict
from hstu_trt.serving.supervision.processes import STOPPED, Watched

READY_TIMEOUT_S = 150.0
_STOP_S = EXIT_TIMEOUT_S + 30.0
_TWICE = 2
_MOST_CAUSE_LINES = 6
_LONGEST_PAUSE_S = 30.0


class ReplicaError(HstuTrtError):
    """A replica did not start."""

    exit_code = 1


class State(Enum):
    """Where a replica stands; only ``SERVING`` ones are to get requests."""

    STARTING = "starting"
    SERVING = "serving"
    DOWN = "down"
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """How to start a replica."""

    name: str
    deployment: Deployment
    version: str
    """Digest of the deployment's manifest; another one is not started under this name."""
    port: int
    gpu: str | None
    """For CUDA_VISIBLE_DEVICES; None leaves it as it is."""
    options: tuple[str, ...] = ()
    """Further options of ``hstu-trt serve``."""
    log: Path

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"


def version_of(deployment: Path) -> str:
    """Digest of a deployment's manifest, which holds those of its files. Raises ArtefactError."""
    try:
        return hashlib.sha256((deployment / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise ArtefactError(f"{deployment / MANIFEST_NAME} cannot be read: {error.strerror}") from None


def told_by_serve(log: bytes) -> dict[str, Any] | None:
    """The line that ``serve --json`` writes when its server is ready; None without a whole one."""
    for line in log.splitlines():
        if line.startswith(b'{"url"'):
            with suppress(ValueError):  # half of it is written
                return dict(json.loads(line))
    return None


class Replica:
    """A server, its canaries, and the verdict on it. All methods belong to one event loop."""

    def __init__(self, plan: ReplicaPlan, tell: Callable[[str], None]) -> None:
        self.plan = plan
        self.state = State.STARTING
        self.reading: Reading | None = None
        """The last that was not right, or the last."""
        self.restarts = 0
        self.bad_looks = 0
        self._tell = tell
        self._process: asyncio.subprocess.Process | None = None
        self._watched: Watched | None = None
        self._servers: set[int] = set()
        self._canaries: list[Canary] = []
        self._watch: asyncio.Task[None] | None = None
        self._log_start = 0
        self._facts: dict[str, Any] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def is_wrong(self) -> bool:
        """Answered, and wrongly: worse than no answer."""
        return self.reading is not None and self.reading.verdict is Verdict.WRONG

    async def start(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Starts the server and waits until all that is served answers. Raises ReplicaError with the cause."""
        await self._spawn()
        deadline = time.monotonic() + timeout_s
        while self.state is State.STARTING:
            if not self.is_alive:
                raise ReplicaError(f"{self.plan.name} did not start: {self.cause()}")
            if time.monotonic() > deadline:
                await self.stop()
                raise ReplicaError(f"{self.plan.name} did not answer within {timeout_s:g} s: {self.reading}")
            await self.look()
            await asyncio.sleep(0.2)
        self._watch = asyncio.create_task(self._keep_alive())

    async def look(self) -> None:
        """Asks every served model, and settles whether requests may go there.

        Nobody there, or a wrong answer, counts at once; another bad verdict, and a good one after it, when it is
        repeated: a busy machine is late at times. Before ``serve`` has held the first answers against each other, or
        against the one that it knows, nothing is asked: a canary takes the first answer for the right one.
        """
        if self.is_alive:
            self._servers = children_of(self.pid or 0)
            if self._watched is not None and self._watched.look() == STOPPED:
                self._end_stopped()
                return
        self._facts = self._facts or self._told()
        if self._facts is None:
            return
        sent = [canary.send() for canary in self._canaries]
        readings = [await asyncio.wrap_future(each.future) for each in sent]
        bad = [reading for reading in readings if not reading.verdict.is_healthy]
        if self.state is State.STARTING and not bad:
            self.reading, self.state = readings[0], State.SERVING
        elif self.state in (State.SERVING, State.DOWN):
            self._judge(readings, bad)

    def _end_stopped(self) -> None:
        """Kills a ``serve`` that a signal has stopped: it watches over nothing any more. ``_keep_alive`` goes on."""
        self._tell(f"{self.plan.name} {STOPPED} and is ended")
        self._watched = None
        self._kill_servers()
        if self._process is not None:
            self._process.kill()

    def _judge(self, readings: list[Reading], bad: list[Reading]) -> None:
        if self.state is State.SERVING:
            self.bad_looks = self.bad_looks + 1 if bad else 0
            at_once = any(reading.verdict in (Verdict.GONE, Verdict.WRONG) for reading in bad)
            if at_once or self.bad_looks >= _TWICE:
                self._goes_down(bad[0])
        else:
            self.bad_looks = 0 if bad else self.bad_looks - 1
            if self.bad_looks <= -_TWICE:
                self.state, self.reading, self.bad_looks = State.SERVING, readings[0], 0
                self._tell(f"{self.plan.name} answers again")
            elif bad:
                self.reading = bad[0]

    def _goes_down(self, reading: Reading) -> None:
        self.state, self.reading, self.bad_looks = State.DOWN, reading, 0
        self._tell(f"{self.plan.name} is down: {reading}")

    async def stop(self) -> None:
        """SIGTERM, upon which ``serve`` drains its server; SIGKILL where that takes too long."""
        self.state = State.STOPPED
        if self._watch is not None:
            self._watch.cancel()
        if self._process is not None and self.is_alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_S)
            except asyncio.TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._kill_servers()
        for canary in self._canaries:
            canary.close()
        self._canaries = []

    def cause(self) -> str:
        """What the server said last, since it was started."""
        with suppress(OSError):
            text = self.plan.log.read_bytes()[self._log_start :].decode(errors="replace").strip()
            if text:
                return "\n  ".join(text.splitlines()[-_MOST_CAUSE_LINES:])
        return f"it ended without a word, see {self.plan.log}"

    def status(self) -> dict[str, Any]:
        """For ``hstu-trt fleet status``."""
        return {
            "name": self.plan.name, "state": self.state.value, "address": self.plan.address, "pid": self.pid,
            "gpu": self.plan.gpu, "restarts": self.restarts, "last": str(self.reading) if self.reading else "",
            "metrics": (self._facts or {}).get("metrics"),
        }  # fmt: skip

    async def _spawn(self) -> None:
        plan = self.plan
        if version_of(plan.deployment.path) != plan.version:
            raise ReplicaError(
                f"{plan.deployment.path} was changed since {plan.name} was planned; assemble a new version into a "
                "folder of its own and switch to it with: hstu-trt release"
            )
        environment = dict(os.environ)
        if plan.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = plan.gpu
        command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(plan.deployment.path)]
        command += ["--grpc-port", str(plan.port), "--json", *plan.options]
        plan.log.parent.mkdir(parents=True, exist_ok=True)
        with plan.log.open("ab") as log:
            self._log_start, self._facts = log.tell(), None
            self._process = await asyncio.create_subprocess_exec(
                *tied_to_us(command), env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._watched = Watched(self._process.pid, "serve")
        if not self._canaries:
            self._canaries = [Canary.of(plan.deployment, plan.address, model) for model in plan.deployment.served]

    async def _keep_alive(self) -> None:
        """Starts ``serve`` again when it ends; what it leaves behind, a draining server, would refuse requests."""
        pause_s = 1.0
        while self.state not in (State.STOPPED, State.DRAINING) and self._process is not None:
            began = time.monotonic()
            code = await self._process.wait()
            self._kill_servers()
            if self.state is State.SERVING:
                self._goes_down(Reading(model="serve", verdict=Verdict.GONE, seconds=0.0, text=f"exit code {code}"))
            pause_s = 1.0 if time.monotonic() - began > _LONGEST_PAUSE_S else min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)
            self.restarts += 1
            try:
                await self._spawn()
            except (HstuTrtError, OSError) as error:
                self._tell(f"{self.plan.name} is not started again: {error}")
                return

    def _told(self) -> dict[str, Any] | None:
        """What ``serve`` has told of its server since it was started; None before it is ready."""
        try:
            return told_by_serve(self.plan.log.read_bytes()[self._log_start :])
        except OSError:
            return None

    def _kill_servers(self) -> None:
        """Ends the tritonserver, which leads a session with its stubs, if it has outlived its supervisor."""
        for pid in self._servers:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            reap(pid)
        self._servers = set()


def upstream_states(replicas: Sequence[Replica]) -> list[tuple[Replica, bool]]:
    """Replicas that the gateway is to name, and whether each gets requests.

    Those that drain are left out. Where no replica is well, all that did not answer wrongly get requests all the same:
    a verdict may be late, and an error can only become an answer.
    """
    named = [replica for replica in replicas if replica.state in (State.SERVING, State.DOWN)]
    well = [replica for replica in named if replica.state is State.SERVING]
    open_to_requests = well or [replica for replica in named if not replica.is_wrong]
    return [(replica, replica in open_to_requests) for replica in named]
