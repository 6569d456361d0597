"""The thread that notices what is published, opens it beside what is served, and swaps or refuses it."""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError, ConfigError, HstuTrtError
from hstu_trt.contract.manifest import MANIFEST_NAME
from hstu_trt.contract.table_versions import CURRENT_NAME
from hstu_trt.serving.refresh.releases import PassedOver, ReleaseFolder
from hstu_trt.tables.refresh import NoRoomError

_LONGEST_DELAY_S = 300.0
"""Between two tries of a version; each reads it whole."""


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """What became of one published version."""

    version: str
    seconds: float
    """From noticing it to serving or refusing it."""
    refused: str | None = None
    """Why it is not served."""


class Watcher:
    """Polls ``CURRENT`` from a thread of its own; ``take`` gets every newly published version once.

    take: opens, verifies and serves a version; what it raises is the reason of a refusal, and the old one goes on.
    A version that was refused is tried again when it is published anew or its manifest changes; and, ever more rarely,
    where the reason was not the version: a cluster out of reach, files or memory that the machine lacked, other steps
    that were not ready. Such a reason is told once.
    """

    def __init__(
        self, folder: ReleaseFolder, poll_s: float, take: Callable[[Path], None], tell: Callable[[Refresh], None],
        every_poll: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._folder, self._poll_s, self._take, self._tell, self._every_poll = folder, poll_s, take, tell, every_poll
        self._seen: object = None
        self._seen = self._look()
        self._told: str | None = None
        self._tries, self._retry_at = 0, math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refresh", daemon=True)
        self.passed_over: PassedOver | None = None
        """What stood in CURRENT at the construction and could not be served; told as refused once the watch begins."""

    def start(self) -> None:
        """Begins to watch for what is published after the construction."""
        if self.passed_over is not None:
            self._tell(Refresh(version=self.passed_over.version, seconds=0.0, refused=self.passed_over.why))
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after what it is at."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def stopping(self) -> bool:
        """Whether the thread is to end: what takes long must look."""
        return self._stop.is_set()

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            self.poll()

    def poll(self) -> None:
        """Looks once. Raises nothing: the thread must live whatever is published."""
        try:
            found = self._look()
            if found != self._seen:
                self._seen, self._told = found, None
                self._tries, self._retry_at = 0, math.inf
                if found is not None:
                    self._refresh(found)
            elif time.monotonic() >= self._retry_at:
                self._refresh(found)
            self._every_poll()
        except Exception as error:  # a bug, or the machine's
            self._tell(Refresh(version="?", seconds=0.0, refused="".join(traceback.format_exception(error))))

    def _look(self) -> object:
        """The version in use and its manifest's identity, or what is wrong with ``CURRENT``; None without one."""
        try:
            before = self._current_file()
            version = self._folder.current()
            if version is None:
                return None
            stat = (version / MANIFEST_NAME).stat()
            if self._current_file() != before:
                return self._seen  # replaced meanwhile: look again next time
            return version, stat.st_mtime_ns, stat.st_ino, before
        except (HstuTrtError, OSError) as error:
            return str(error)

    def _current_file(self) -> tuple[int, int] | None:
        try:
            stat = (self._folder.path / CURRENT_NAME).stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    def _refresh(self, found: object) -> None:
        began = time.monotonic()
        if not isinstance(found, tuple):
            self._tell(Refresh(version="CURRENT", seconds=0.0, refused=str(found)))
            return
        version: Path = found[0]
        reason, passes = self._try(version)
        self._tries += 1
        self._retry_at = time.monotonic() + self._delay() if passes else math.inf
        if reason is None or reason != self._told:
            self._told = reason
            self._tell(Refresh(version=version.name, seconds=time.monotonic() - began, refused=reason))

    def _try(self, version: Path) -> tuple[str | None, bool]:
        """Why a version is not served, and whether that may pass."""
        try:
            self._take(version)
        except NoRoomError as error:
            return str(error), True
        except (ArtefactError, ConfigError) as error:
            return str(error), False
        except (HstuTrtError, OSError, MemoryError) as error:
            return str(error) or type(error).__name__, True
        except Exception as error:  # a bug: the old version is still the better answer
            return "".join(traceback.format_exception(error)), False
        return None, False

    def _delay(self) -> float:
        return min(_LONGEST_DELAY_S, self._poll_s * 2.0 ** min(self._tries, 60))
