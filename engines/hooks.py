"""What TensorRT calls back while it builds: a log that is kept, and progress on stderr.

Both classes must derive from the module's own, hence functions that make them. Ctrl-C arrives in whichever call-back
runs; an exception must not cross into TensorRT, so it stops the build by ``step_complete`` and is raised afterwards.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Any, TextIO

_BAR = 24
_ACTIVATION = re.compile(r"Total Activation Memory: (\d+) bytes")
_KERNEL = re.compile(r"^Name: .*LayerType: (?!allocate|deallocate)")


@dataclass
class BuildLog:
    """Messages of one build."""

    errors: list[str] = field(default_factory=list)
    activation_bytes: list[int] = field(default_factory=list)
    """Of each profile, as the build reports it."""
    kernels: int = 0
    """Entries of the engine's layer list that launch work, over all profiles; 0 where the library prints no list."""
    interrupted: bool = False

    def add(self, message: str, is_error: bool) -> None:
        """Keeps what is worth keeping of a message."""
        if is_error:
            self.errors.append(message)
        self.activation_bytes += [int(size) for size in _ACTIVATION.findall(message)]
        self.kernels += sum(bool(_KERNEL.match(line)) for line in message.splitlines())


def make_logger(module: Any, log: BuildLog) -> Any:
    """A logger of the module that fills ``log``; it takes every message, since TensorRT asks for no level."""
    errors = (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR)

    class Logger(module.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            try:
                log.add(message, severity in errors)
            except KeyboardInterrupt:
                log.interrupted = True

    return Logger()


def make_monitor(module: Any, log: BuildLog, title: str, stream: TextIO) -> Any:
    """A progress monitor of the module: a bar on a terminal, nothing elsewhere."""
    phases: dict[str, tuple[str | None, int, int]] = {}
    lock, shows = threading.Lock(), stream.isatty()

    def show() -> None:
        if shows:
            stream.write("\r\033[K" + progress_line(title, phases))
            stream.flush()

    class Monitor(module.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                phases[phase_name] = (parent_phase, 0, num_steps)
                show()

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                with lock:
                    parent, _, steps = phases.get(phase_name, (None, 0, step + 1))
                    phases[phase_name] = (parent, step + 1, steps)
                    show()
            except KeyboardInterrupt:
                log.interrupted = True
            return not log.interrupted

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                phases.pop(phase_name, None)
                if shows and not phases:
                    stream.write("\r\033[K")
                    stream.flush()

    return Monitor()


def progress_line(title: str, phases: dict[str, tuple[str | None, int, int]]) -> str:
    """As in ``hstu [######      ] Building engine 3/6, Cloning network graph 12/51``."""
    outer = [name for name, (parent, _, _) in phases.items() if parent is None]
    if not outer:
        return title
    _, done, steps = phases[outer[0]]
    filled = _BAR * done // max(steps, 1)
    parts = [
        f"{name} {at}/{of}" for name, (_, at, of) in phases.items() if name == outer[0] or name == list(phases)[-1]
    ]
    return f"{title} [{'#' * filled}{' ' * (_BAR - filled)}] {', '.join(parts)}"
