"""TensorRT and TensorRT-RTX: two Python modules with nearly the same API. Here, and only here, one is picked."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from hstu_trt.contract.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """One of the two libraries."""

    name: str
    """Name of module, builder and runner."""
    title: str
    package: str
    """What pip installs."""
    oldest: tuple[int, int]
    """First version that this code is written for."""
    majors: tuple[int, ...]
    on_device: bool
    """Builds on the GPU that will run the engine, with our plugins. Otherwise builds anywhere, and has no plugins."""


TENSORRT = Flavour(
    name="tensorrt", title="TensorRT", package="tensorrt", oldest=(10, 15), majors=(10, 11), on_device=True
)
TENSORRT_RTX = Flavour(
    name="tensorrt_rtx",
    title="TensorRT-RTX",
    package="tensorrt-rtx-cu13",
    oldest=(1, 7),
    majors=(1,),
    on_device=False,
)
FLAVOURS = {flavour.name: flavour for flavour in (TENSORRT, TENSORRT_RTX)}


@dataclass(frozen=True, kw_only=True)
class TensorRt:
    """An imported library."""

    flavour: Flavour
    module: Any
    version: str


def open_module(flavour: Flavour) -> TensorRt:
    """Imports a library and checks its version. Raises ConfigError that says what to install."""
    try:
        module = importlib.import_module("tensorrt") if flavour is TENSORRT else importlib.import_module("tensorrt_rtx")
    except ImportError as error:
        raise ConfigError(
            f"the Python module {flavour.name!r} cannot be imported ({error}); "
            f"install {flavour.title}: pip install {flavour.package}"
        ) from None
    version = str(module.__version__)
    numbers = version_numbers(version)
    if numbers[0] not in flavour.majors or numbers[:2] < flavour.oldest:
        wanted = ".".join(map(str, flavour.oldest))
        raise ConfigError(
            f"{flavour.title} {version} is installed; this needs {wanted} or later, up to {flavour.majors[-1]}.x: "
            f"pip install '{flavour.package}>={wanted},<{flavour.majors[-1] + 1}'"
        )
    return TensorRt(flavour=flavour, module=module, version=version)


def version_numbers(version: str) -> tuple[int, ...]:
    """``"11.4.0.106"`` -> (11, 4, 0, 106); ends before the first part that is no number."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers) or (0,)
