"""Folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``out`` that takes its place at the end.

    An error or Ctrl-C leaves ``out`` as it was. Where ``out`` is a link, what it leads to is replaced. Raises OSError
    where no folder can be made there.
    """
    out = out.resolve()
    _make_parents(out)
    # Not the process id alone: in containers it is the same each time, and a process that was killed leaves its part.
    mark = f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}"
    part, old = (out.with_name(f"{mark}.{what}") for what in ("part", "old"))
    part.mkdir()
    try:
        yield part
        if out.exists():
            out.rename(old)
        part.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _make_parents(out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # what is there is a file: "File exists" would tell nobody what is wrong
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), error.filename) from None
