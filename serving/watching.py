"""The thread that notices what is published, opens it beside what is served, and swaps or refuses it."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.contract.manifest import MANIFEST_NAME
from hstu_trt.serving.releases import ReleaseFolder


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
    A version that was refused is tried again when it is published anew or its manifest changes.
    """

    def __init__(
        self, folder: ReleaseFolder, poll_s: float, take: Callable[[Path], None], tell: Callable[[Refresh], None],
        every_poll: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._folder, self._poll_s, self._take, self._tell, self._every_poll = folder, poll_s, take, tell, every_poll
        self._seen: object = self._look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="refresh", daemon=True)

    def start(self) -> None:
        """Begins to watch for what is published after the construction."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, after what it is at."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            self.poll()

    def poll(self) -> None:
        """Looks once. Raises nothing: the thread must live whatever is published."""
        try:
            found = self._look()
            if found != self._seen:
                self._seen = found
                if found is not None:
                    self._refresh(found)
            self._every_poll()
        except Exception as error:  # a bug, or the machine's
            self._tell(Refresh(version="?", seconds=0.0, refused="".join(traceback.format_exception(error))))

    def _look(self) -> object:
        """The version in use and its manifest's identity, or what is wrong with ``CURRENT``; None without one."""
        try:
            version = self._folder.current()
            if version is None:
                return None
            stat = (version / MANIFEST_NAME).stat()
            current = (self._folder.path / "CURRENT").stat()
            return version, stat.st_mtime_ns, stat.st_ino, current.st_mtime_ns, current.st_ino
        except (HstuTrtError, OSError) as error:
            return str(error)

    def _refresh(self, found: object) -> None:
        began = time.monotonic()
        if not isinstance(found, tuple):
            self._tell(Refresh(version="CURRENT", seconds=0.0, refused=str(found)))
            return
        version: Path = found[0]
        try:
            self._take(version)
            reason = None
        except (HstuTrtError, OSError, MemoryError) as error:
            reason = str(error)
        except Exception as error:  # a bug: the old version is still the better answer
            reason = "".join(traceback.format_exception(error))
        self._tell(Refresh(version=version.name, seconds=time.monotonic() - began, refused=reason))
