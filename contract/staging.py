"""Folders that appear whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``out`` that takes its place at the end; an error leaves ``out`` as it was."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    part, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("part", "old"))
    part.mkdir()
    try:
        yield part
        if out.exists():
            out.rename(old)
        try:
            part.rename(out)
        except OSError:
            old.rename(out)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
