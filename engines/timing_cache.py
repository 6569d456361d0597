"""TensorRT's timing cache on disk: how long each tactic took, per GPU and version, so that a second build is quick."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TimingCache:
    """One file; builds that run at the same time join what they learnt."""

    path: Path

    @classmethod
    def of(cls, folder: Path, device_name: str, version: str) -> TimingCache:
        """The cache of a GPU and a TensorRT version: timings of another GPU or version do not apply."""
        name = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
        return cls(path=folder / f"{name}-tensorrt-{version}.timing")

    def attach(self, config: Any) -> None:
        """Gives a builder config what the file holds; a file that TensorRT refuses counts as empty."""
        cache = config.create_timing_cache(self._read())
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def keep(self, config: Any) -> None:
        """Writes the config's cache, joined with what others wrote meanwhile."""
        cache = config.get_timing_cache()
        others = config.create_timing_cache(self._read())
        if others is not None:
            cache.combine(others, False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        part.write_bytes(bytes(cache.serialize()))
        os.replace(part, self.path)

    def _read(self) -> bytes:
        return self.path.read_bytes() if self.path.is_file() else b""
