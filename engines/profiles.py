"""Optimisation profiles: the shapes that an engine is tuned for and accepts, from the contract's dims.

``single``: one user with any history and candidates up to the limits, tuned for the longest. ``batch``: the contract's
dims. ``NAME:users=1/4/8,uih_tokens=0/512/4096``: own bounds (min/opt/max) in place of the contract's.
A dim that follows from another has no bounds of its own: ``users_plus_1`` is users + 1, ``X_x_n`` is n times X.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.tensors import Dim, Limits, StageSpec

Shape = tuple[int, ...]
Bounds = tuple[int, int, int]

SINGLE, BATCH = "single", "batch"
DEFAULT_PROFILES = (SINGLE, BATCH)
_GIVEN_DIMS = ("users", "uih_tokens", "candidates")
_TIMES = re.compile(r"(?P<base>.+)_x_(?P<factor>\d+)$")
_CUSTOM = re.compile(r"[a-z][\w-]*(:\w+=\d+/\d+/\d+(,\w+=\d+/\d+/\d+)*)?")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Bounds of every input of one stage."""

    name: str
    dims: Mapping[str, Bounds]
    """Base dim -> (min, opt, max)."""
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]
    """Input -> (min, opt, max)."""

    def admits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes lie within the bounds."""
        return all(
            len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
            for name, shape in shapes.items()
            for least, _, most in (self.shapes[name],)
        )


def make_profiles(spec: StageSpec, limits: Limits, texts: Sequence[str]) -> list[Profile]:
    """The profiles of a stage, from names or ``NAME:dim=min/opt/max,...``; equal ones once. Raises ConfigError."""
    if len({text.partition(":")[0] for text in texts}) < len(texts):
        raise ConfigError(f"--profile: two profiles have one name: {', '.join(texts)}")
    made: dict[str, Profile] = {}
    for text in texts:
        profile = _make(spec, limits, text)
        made.setdefault(str(sorted(profile.shapes.items())), profile)
    return list(made.values())


def _make(spec: StageSpec, limits: Limits, text: str) -> Profile:
    if not _CUSTOM.fullmatch(text):
        raise ConfigError(f"--profile {text!r}: give a name, or NAME:dim=MIN/OPT/MAX,..., as in small:users=1/4/8")
    name, _, given = text.partition(":")
    dims = _contract_dims(spec)
    if name == SINGLE:
        dims |= {dim: bounds for dim, bounds in _single(limits, dims).items() if dim in dims}
    elif name != BATCH and not given:
        raise ConfigError(f"--profile {name}: no such profile; choose {SINGLE}, {BATCH}, or give its bounds")
    dims |= dict(_given_bounds(given, dims))
    if "norms" in dims:
        dims["norms"] = (1, 1, dims["users"][2])
    shapes = {}
    for tensor in spec.inputs:
        per_axis = [_resolve(dim, dims) if isinstance(dim, Dim) else (dim, dim, dim) for dim in tensor.dims]
        least, opt, most = (tuple(bounds[n] for bounds in per_axis) for n in range(3))
        shapes[tensor.name] = (least, opt, most)
    return Profile(name=name, dims=dims, shapes=shapes)


def _contract_dims(spec: StageSpec) -> dict[str, Bounds]:
    """Bounds of the base dims of a stage's inputs."""
    dims: dict[str, Bounds] = {}
    for dim in (dim for tensor in spec.inputs for dim in tensor.dims if isinstance(dim, Dim)):
        base, factor, plus = _base(dim.name)
        dims[base] = ((dim.min - plus) // factor, (dim.opt - plus) // factor, (dim.max - plus) // factor)
    return dims


def _single(limits: Limits, dims: Mapping[str, Bounds]) -> dict[str, Bounds]:
    fewest = dims.get("uih_tokens", (0, 0, 0))[0]
    return {
        "users": (1, 1, 1),
        "uih_tokens": (fewest, limits.history, limits.history),
        "candidates": (1, limits.candidates, limits.candidates),
    }


def _given_bounds(text: str, dims: Mapping[str, Bounds]) -> Iterator[tuple[str, Bounds]]:
    for part in filter(None, text.split(",")):
        dim, _, numbers = part.partition("=")
        least, opt, most = (int(number) for number in numbers.split("/"))
        if dim not in _GIVEN_DIMS:
            raise ConfigError(
                f"--profile: no dim {dim!r}; choose from {', '.join(_GIVEN_DIMS)} (others follow from these)"
            )
        if dim not in dims:
            continue
        lowest, _, highest = dims[dim]
        if not lowest <= least <= opt <= most <= highest:
            raise ConfigError(f"--profile: {part}: needs min <= opt <= max, from {lowest} to {highest} in this model")
        yield dim, (least, opt, most)


def _resolve(dim: Dim, dims: Mapping[str, Bounds]) -> Bounds:
    base, factor, plus = _base(dim.name)
    least, opt, most = dims[base]
    return least * factor + plus, opt * factor + plus, most * factor + plus


def _base(name: str) -> tuple[str, int, int]:
    """The dim that a dim follows from, with factor and summand."""
    times = _TIMES.match(name)
    if times:
        return times["base"], int(times["factor"]), 0
    return (name.removesuffix("_plus_1"), 1, 1) if name.endswith("_plus_1") else (name, 1, 0)
