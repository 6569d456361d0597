"""What a builder of engines is, and what it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.engines.stages import engine_stages
from hstu_trt.engines.targets import GpuTarget

Compatibility = Literal["none", "ampere_plus", "same_cc"]
COMPATIBILITIES: tuple[Compatibility, ...] = ("none", "ampere_plus", "same_cc")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What a user may choose beyond model, GPU and precision; all of it is part of an engine's key."""

    stages: tuple[str, ...] = ()
    """Stages to build; none: the builder's choice."""
    profiles: tuple[str, ...] = ()
    """Optimisation profiles (``profiles.py``); none: ``single`` and ``batch``."""
    plugins: bool = True
    """False: function bodies in place of plugins, for a baseline."""
    also: tuple[str, ...] = ()
    """Further targets that the same engines are to run on (TensorRT-RTX)."""
    hardware_compat: Compatibility = "none"
    version_compatible: bool = False
    refit: bool = False
    strip_plan: bool = False
    tf32: bool = False
    optimization_level: int | None = None
    """0 to 5; None: the library's default."""
    workspace_mib: int | None = None
    """Scratch memory of an engine; None: the library's default."""
    max_table_mib: int = 256
    """Without plugins tables become constants of the engine: a stage with larger ones is not built."""

    def facts(self) -> dict[str, Any]:
        """What differs from the defaults, for keys and manifests."""
        default = BuildOptions()
        pairs = ((f.name, getattr(self, f.name), getattr(default, f.name)) for f in dataclasses.fields(self))
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value, usual in pairs if value != usual
        }


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What is to be built from what."""

    model: ModelFolder
    target: GpuTarget
    options: BuildOptions
    cache: Path
    """Folder for timing caches, and for engines by their key (``plan_store.py``)."""
    quiet: bool = True
    """No progress on stderr."""

    def chosen_stages(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """The stages to build, in the order of a request. Raises ConfigError for a name that the model lacks."""
        known = engine_stages(self.model)
        for stage in self.options.stages:
            if stage not in known:
                raise ConfigError(f"{self.model.name} has no stage {stage!r}: choose from {', '.join(known)}")
        wanted = self.options.stages or default
        return tuple(stage for stage in known if stage in wanted)


@dataclass(frozen=True, kw_only=True)
class BuiltStage:
    """One stage of an engines folder."""

    stage: str
    file: str
    """What the runner opens: a path, relative to the engines folder if it lies there."""
    bytes: int
    seconds: float
    """To build it; for ONNX Runtime, to load it."""
    key: str = ""
    """sha256 over what determines the engine; the same key is not built again."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Layers, profiles, activation memory and the like."""


class Builder(Protocol):
    """Makes the engines of one kind."""

    name: str

    def versions(self) -> dict[str, str]:
        """Versions of what determines the result; another version builds again. Raises ConfigError without it."""
        ...

    def check(self, request: BuildRequest) -> None:
        """Refuses options that this builder does not have. Raises ConfigError."""
        ...

    def check_machine(self, request: BuildRequest) -> None:
        """Refuses what cannot be built on this machine: library, GPU, plugins. Raises ConfigError, ArtefactError."""
        ...

    def facts(self, request: BuildRequest) -> dict[str, Any]:
        """What else determines the result, for the folder's digest and manifest."""
        ...

    def build(self, request: BuildRequest, out: Path, *, force: bool) -> tuple[list[BuiltStage], list[str]]:
        """Puts every stage into the empty folder ``out``: from the cache if it was built before, unless ``force``.

        Returns the stages, and the files it wrote, relative to ``out``. Raises ArtefactError.
        """
        ...
