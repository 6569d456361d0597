"""The gateway: a real nginx in front of the replicas, as a child process.

Its open source edition looks at no replica on its own and never reads gRPC's trailers, in which Triton says what went
wrong. So the fleet tells it which replicas get requests (``fleet.py``), by a new config and a reload: the master starts
workers on the new config, and the old ones finish what they have begun, refuse nothing (clients are told by GOAWAY to
open another connection), and exit. Once they have, no request that came through the gateway is with a replica that the
new config does not name: ``settled`` waits for that.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.serving.fleet.gateway_config import GatewaySettings, Upstream, render
from hstu_trt.serving.server_process import tied_to_us
from hstu_trt.serving.supervision.processes import STOPPED, Watched

UNPACKED = Path(__file__).resolve().parents[2] / "build/nginx/usr/sbin/nginx"
_POLL_S = 0.02
_RELOAD_S = 10.0


class GatewayError(HstuTrtError):
    """nginx refused a config, or did not start."""

    exit_code = 1


def find_nginx(given: Path | None = None) -> Path:
    """The given program, what `make nginx` unpacked, else nginx on PATH. Raises ArtefactError."""
    found = str(given or (UNPACKED if UNPACKED.exists() else shutil.which("nginx") or "/usr/sbin/nginx"))
    if not (os.path.isfile(found) and os.access(found, os.X_OK)):
        raise ArtefactError(
            f"no nginx found ({found} is no program): `make nginx` unpacks Debian's; or install one, or use --nginx"
        )
    return Path(found).absolute()


class Gateway:
    """nginx over a folder of its own. All methods belong to one event loop."""

    def __init__(self, nginx: Path, folder: Path, settings: GatewaySettings) -> None:
        self.settings = settings
        self._nginx, self._folder = nginx, folder
        self._config = folder / "nginx.conf"
        self._process: asyncio.subprocess.Process | None = None
        self._old_workers: set[int] = set()
        self._watched: dict[int, Watched] = {}
        self._upstreams: tuple[Upstream, ...] = ()

    @property
    def upstreams(self) -> tuple[Upstream, ...]:
        """What the config in use names."""
        return self._upstreams

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def look(self) -> str | None:
        """What is wrong with the master: it died, or was stopped by a signal; None: nothing.

        A worker that was stopped is killed, upon which the master starts another: nobody is refused meanwhile.
        """
        if self._process is None or not self.is_running:
            return "died"
        master = self._process.pid
        pids = {master, *self._children()}
        self._watched = {pid: self._watched.get(pid) or Watched(pid, "nginx") for pid in pids}
        stopped = {pid for pid, watched in self._watched.items() if watched.look() == STOPPED}
        for worker in stopped - {master}:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        return STOPPED if master in stopped else None

    async def start(self, upstreams: Sequence[Upstream]) -> None:
        """Starts nginx. Raises GatewayError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        await self._write(upstreams)
        await self._launch()

    async def restart(self) -> None:
        """Starts nginx again after its master has died or it was stopped; workers outlive it and hold the port."""
        self._kill_workers()
        await self._launch()

    async def apply(self, upstreams: Sequence[Upstream]) -> None:
        """Takes over another set of replicas, without failing a request. Raises GatewayError, and the old set stays."""
        if tuple(upstreams) == self._upstreams:
            return
        if not self.is_running:
            await self.restart()
        await self._write(upstreams)
        before = self._children()
        assert self._process is not None
        self._process.send_signal(signal.SIGHUP)
        self._old_workers |= before
        await self._new_workers(before)

    async def settled(self, timeout_s: float) -> bool:
        """True once no worker of an older config is left: nothing runs at replicas that are named no more."""
        deadline = time.monotonic() + timeout_s
        while self._old_workers:
            self._old_workers &= self._children()
            if time.monotonic() >= deadline:
                return not self._old_workers
            await asyncio.sleep(_POLL_S)
        return True

    async def stop(self, grace_s: float = 10.0) -> None:
        """Lets running requests finish and ends nginx."""
        if self._process is None:
            return
        if self.is_running:
            self._process.send_signal(signal.SIGQUIT)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        self._kill_workers()
        await self._process.wait()

    async def _write(self, upstreams: Sequence[Upstream]) -> None:
        """Puts the config in place once nginx has found it good."""
        candidate = self._folder / "nginx.conf.new"
        write_text_atomically(candidate, render(self.settings, upstreams, self._folder))
        test = await asyncio.create_subprocess_exec(
            *self._command("-t", config=candidate), env=self._environment(),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await test.communicate()
        if test.returncode:
            raise GatewayError(f"nginx refuses {candidate}: {said.decode(errors='replace').strip()}")
        candidate.replace(self._config)
        self._upstreams = tuple(upstreams)

    def _command(self, *options: str, config: Path) -> list[str]:
        early_log = str(self._folder / "nginx.log")
        return [str(self._nginx), "-p", str(self._folder), "-e", early_log, "-c", str(config), *options]

    def _environment(self) -> dict[str, str]:
        """Libraries that were unpacked with nginx stand where the loader does not look."""
        libraries = [str(folder) for folder in self._nginx.parents[1].glob("lib/*-linux-gnu")]
        if self._nginx != UNPACKED or not libraries:
            return dict(os.environ)
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}

    async def _launch(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *tied_to_us(self._command(config=self._config)), env=self._environment(),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._old_workers = set()
        await self._new_workers(set())

    async def _new_workers(self, before: set[int]) -> None:
        """Waits until the master has workers that it had not. Raises GatewayError with the end of nginx's log."""
        deadline = time.monotonic() + _RELOAD_S
        while time.monotonic() < deadline and self.is_running:
            if self._children() - before:
                return
            await asyncio.sleep(_POLL_S)
        log = self._folder / "nginx.log"
        ends = log.read_text(errors="replace").splitlines()[-3:] if log.exists() else []
        raise GatewayError("\n  ".join(["nginx did not take its config", *ends]))

    def _children(self) -> set[int]:
        """The master's workers, from /proc: a worker's pid is nowhere else."""
        return set() if self._process is None else children_of(self._process.pid)

    def _kill_workers(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def children_of(parent: int) -> set[int]:
    """Processes whose parent this is."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            # The name, in brackets, may hold anything; state and parent follow it.
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == parent:
                found.add(int(stat.parent.name))
    return found
