"""What a builder of engines is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hstu_trt.contract.model_folder import ModelFolder


@dataclass(frozen=True, kw_only=True)
class BuiltStage:
    """One stage of an engines folder."""

    stage: str
    file: str
    """What the runner opens: a path, relative to the engines folder if it lies there."""
    bytes: int
    load_s: float
    """Seconds to load it once when it was built."""


class Builder(Protocol):
    """Makes the engines of one kind."""

    name: str

    def versions(self) -> dict[str, str]:
        """Versions of what determines the result; another version builds again."""
        ...

    def build(self, model: ModelFolder, out: Path) -> tuple[list[BuiltStage], list[str]]:
        """Builds every stage into the empty folder ``out`` and loads it once.

        Returns the stages, and the files it wrote, relative to ``out``. Raises ArtefactError.
        """
        ...
