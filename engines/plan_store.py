"""Engines by what went into them: whatever folder they were built for, none is built twice.

    build/cache/plans/KEY/
      stage.json          what a manifest says of the engine, with the sha256 of its bytes
      <the engine's file>

KEY is ``BuiltStage.key``. The store is bounded, and every part of it may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.manifest import file_sha256
from hstu_trt.contract.staging import staged_folder
from hstu_trt.engines.builders import BuiltStage

_FACTS = "stage.json"
_MOST_BYTES = 16 << 30


@dataclass(frozen=True, kw_only=True)
class PlanStore:
    """Engines in a folder, one per key."""

    folder: Path
    most_bytes: int = _MOST_BYTES
    """Beyond that, those that were used longest ago are deleted."""

    @classmethod
    def of(cls, cache: Path) -> PlanStore:
        """The store in a cache folder."""
        return cls(folder=cache / "plans")

    def find(self, key: str) -> tuple[Path, BuiltStage] | None:
        """The engine that was built for a key, and what is known of it; None where there is none, or a damaged one."""
        entry = self.folder / key
        try:
            facts = json.loads((entry / _FACTS).read_text())
            stage = BuiltStage(**facts["stage"])
            if stage.key != key or file_sha256(entry / stage.file) != facts["sha256"]:
                return None
            os.utime(entry)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return entry / stage.file, stage

    def keep(self, engine: Path, stage: BuiltStage) -> None:
        """Takes in an engine that was just built, by a hard link where that is possible.

        A full disk, or another process at the same entry, costs the next build time, but does not fail this one.
        """
        with suppress(OSError):
            with staged_folder(self.folder / stage.key) as part:
                link_or_copy(engine, part / stage.file)
                facts = {"sha256": file_sha256(engine), "stage": vars(stage)}
                (part / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")
            self._shrink(stage.key)

    def _shrink(self, newest: str) -> None:
        entries = sorted((e for e in self.folder.iterdir() if not e.name.startswith(".")), key=_last_use, reverse=True)
        total = 0
        for entry in entries:
            total += sum(file.stat().st_size for file in entry.iterdir())
            if total > self.most_bytes and entry.name != newest:
                shutil.rmtree(entry, ignore_errors=True)


def _last_use(entry: Path) -> float:
    return entry.stat().st_mtime


def link_or_copy(source: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``source``, or a copy of it on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
