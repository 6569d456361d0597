"""Runs damaged files through what reads them: a refusal by name, or a sound read; nothing else, and in bounded time."""

from __future__ import annotations

import argparse
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mutations import mutate

from hstu_trt.contract.errors import HstuTrtError

_MOST_FILE_BYTES, _MOST_MORE_MEMORY = 64 << 20, 2 << 30
_MOST_SECONDS = 20.0


@dataclass(frozen=True)
class Target:
    """A file to damage, and what reads it."""

    name: str
    folder: Path
    file: str
    read: Callable[[Path], None]

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.file


MakeTargets = Callable[[Path], Sequence[Target]]
"""An empty folder -> targets, whose files are in it and whole."""


class HungError(BaseException):
    """A reader that does not end. No Exception, so that no reader takes it for its own."""


def files_in(folder: Path) -> list[str]:
    """Relative paths of all files."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def bound_resources() -> None:
    """What would fill a disk or the memory is a fault, and not to be found out the hard way."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _MOST_MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_FSIZE, (_MOST_FILE_BYTES, _MOST_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _hung)


def _hung(*_: object) -> None:
    raise HungError(f"still reading after {_MOST_SECONDS:g} s")


def read_damaged(target: Target, content: bytes) -> str | None:
    """Reads the target with that content in its file, and puts the file back; returns what went wrong."""
    original = target.path.read_bytes()
    target.path.write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
    try:
        target.read(target.folder)
    except HstuTrtError as error:
        return None if str(error).strip() else "a refusal without a word"
    except (Exception, HungError):  # whatever else a reader lets through is a fault
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        target.path.write_bytes(original)
    return None


def run_case(target: Target, number: int) -> str | None:
    """Damages the target's file by the number; returns what went wrong."""
    content = mutate(target.path.read_bytes(), random.Random(f"{target.name} {number}"))
    return read_damaged(target, content)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all fuzzers have."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--target", help="only the targets whose names hold this")
    return options


def whole_targets(make: MakeTargets, folder: Path, name: str | None) -> list[Target]:
    """The targets of that name, each of which takes what is whole."""
    chosen = [target for target in make(folder) if (name or "") in target.name]
    for target in chosen:
        target.read(target.folder)
    return chosen


def main(description: str | None, make: MakeTargets) -> int:
    """Runs cases for a while; exit code 1 if one went wrong."""
    options = parser(description)
    options.add_argument(
        "--first", type=int, default=int(time.time()), help="number of the first case (default: a new one)"
    )
    options.add_argument("--only", type=int, help="only this number")
    args = options.parse_args()
    faults = cases = 0
    with tempfile.TemporaryDirectory() as folder:
        chosen = whole_targets(make, Path(folder), args.target)
        bound_resources()
        numbers = [args.only] if args.only is not None else None
        number, end = args.first, time.monotonic() + args.seconds
        while numbers or (args.only is None and time.monotonic() < end):
            number = numbers.pop() if numbers else number + 1
            for target in chosen:
                cases += 1
                if fault := run_case(target, number):
                    faults += 1
                    print(f"--target {target.name!r} --only {number}\n{fault}", flush=True)
    print(f"{cases} cases from {args.first} on, {faults} faults")
    return 1 if faults else 0
