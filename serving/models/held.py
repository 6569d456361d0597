"""What the processes of a running server hold and serve, as small files: for each other, and for people.

    run/live/<pid of the server>/hstu.json     {"model": "hstu", "holds": [digests of dense models], ...}
    run/live/<pid of the server>/serve.json    {"model": "serve", "restarts": 2}, from the supervisor

Written by renaming, so that a reader sees it whole. A file of a server that died without a word may stay behind; a
process overwrites its own when it starts, and what it does not hold it opens when a request names it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from hstu_trt.contract.manifest import write_text_atomically

LIVE_FOLDER = "live"
SUPERVISOR = "serve"
"""Who writes beside the models how often it has restarted the server: ``restarts``."""


class Board:
    """The status files of one server."""

    def __init__(self, run: Path, server: int) -> None:
        self.folder = run / LIVE_FOLDER / str(server)
        self.failure: OSError | None = None
        """Why the last word could not be written."""

    def write(self, model: str, facts: dict[str, Any]) -> None:
        """Says what a model holds. Where nothing can be written, requests are served all the same."""
        self.failure = None
        try:
            write_text_atomically(self.folder / f"{model}.json", json.dumps({"model": model, **facts}) + "\n")
        except OSError as error:
            self.failure = error

    def remove(self, model: str) -> None:
        """Takes a model's word back, when it is unloaded."""
        with contextlib.suppress(OSError):
            (self.folder / f"{model}.json").unlink()
            self.folder.rmdir()

    def holds(self, model: str, digest: str) -> bool:
        """Whether a model says that it holds a dense model."""
        held = self._read(model).get("holds")
        return isinstance(held, list) and digest in held

    def dense_in_use(self, model: str) -> str | None:
        """The digest of the dense model that a model says it serves; None where it says nothing."""
        digest = self._read(model).get("dense")
        return digest if isinstance(digest, str) else None

    def restarts(self) -> int | None:
        """Of the server before this one, and before that, by the same ``serve``; None where nobody says, or not yet."""
        count = self._read(SUPERVISOR).get("restarts")
        return count if isinstance(count, int) else None

    def _read(self, model: str) -> dict[str, Any]:
        try:
            facts = json.loads((self.folder / f"{model}.json").read_text())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def wait_until_held(
        self, models: Collection[str], digest: str, timeout_s: float, go_on: Callable[[], bool] = lambda: True
    ) -> list[str]:
        """Those that do not hold a dense model after so long, or once ``go_on``, which is asked often, says no."""
        deadline = time.monotonic() + timeout_s
        while missing := [model for model in models if not self.holds(model, digest)]:
            if time.monotonic() >= deadline or not go_on():
                break
            time.sleep(0.02)
        return missing
