"""Settings of refreshes: from the command line to ``config.pbtxt`` and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hstu_trt.contract.errors import ConfigError
from hstu_trt.tables.refresh import REFRESH_MODES, RefreshMode

DEFAULT_POLL_S = 1.0
BadVersion = Literal["refuse", "previous"]
BAD_VERSIONS: tuple[BadVersion, ...] = get_args(BadVersion)


@dataclass(frozen=True, kw_only=True)
class RefreshSettings:
    """How a deployment takes what is published."""

    tables: Path | None = None
    """Folder of versions; None: the model's own tables, for good."""
    mode: RefreshMode = "auto"
    memory_bytes: int | None = None
    """``RefreshOptions.memory_budget``."""
    poll_s: float = DEFAULT_POLL_S
    bad_version: BadVersion = "refuse"
    """What a server does whose start finds a version in use that it cannot serve: ``refuse`` ends the start, and
    ``previous`` serves the version before it, until another one is published."""

    def __post_init__(self) -> None:
        refresh_mode(self.mode)
        takes_previous(self.bad_version)
        positive_seconds(str(self.poll_s))
        if self.memory_bytes is not None and self.memory_bytes < 0:
            raise ConfigError(f"a memory budget of {self.memory_bytes} bytes: give 0 or more")
        if self.tables is not None and not self.tables.is_dir():
            raise ConfigError(f"{self.tables} is no folder; it holds the versions of the tables")

    def command_options(self) -> dict[str, object]:
        """As options of ``assemble``; None where one is not needed."""
        usual = RefreshSettings()
        return {
            "--tables": self.tables,
            "--refresh": None if self.mode == usual.mode else self.mode,
            "--refresh-memory": None if self.memory_bytes is None else self.memory_bytes / 1e9,
            "--refresh-poll": None if self.poll_s == usual.poll_s else self.poll_s,
            "--bad-version": None if self.bad_version == usual.bad_version else self.bad_version,
        }

    def parameters(self) -> dict[str, str]:
        """As parameters of the models."""
        budget = {} if self.memory_bytes is None else {"refresh_memory_bytes": str(self.memory_bytes)}
        poll = {"refresh_poll_seconds": f"{self.poll_s:g}"}
        return {"refresh": self.mode, "bad_version": self.bad_version, **poll, **budget}


def refresh_mode(text: str) -> RefreshMode:
    """Raises ConfigError."""
    for known in REFRESH_MODES:
        if text == known:
            return known
    raise ConfigError(f"unknown refresh mode {text!r}: choose from {', '.join(REFRESH_MODES)}")


def takes_previous(text: str) -> bool:
    """Whether a ``bad_version`` at the start leads to the version before it. Raises ConfigError."""
    if text not in BAD_VERSIONS:
        raise ConfigError(f"bad version: {text!r} is none of {', '.join(BAD_VERSIONS)}")
    return text == "previous"


def positive_seconds(text: str) -> float:
    """Raises ConfigError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise ConfigError(f"{text!r} is no positive number of seconds")
    return value
