"""What a deployment serves: ``ranking``, ``ranking_fused``, or both; and what each takes of the repository.

The deployment's manifest says which (``Deployment.served``); all else follows from it by way of this module. A client
that has no deployment at hand asks the server (``client.served_by``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, STAGES

SERVED = (ENSEMBLE, FUSED)
"""The models that requests may come to. Both are served unless ``assemble --served`` names one."""

LOOKUPS: Mapping[str, str] = {ENSEMBLE: STAGES[0], FUSED: FUSED}
"""Served model -> the one that looks its rows up, in a process of its own; requests wait there."""

LOOKUP_MODELS = tuple(LOOKUPS.values())


def parse_served(text: str) -> tuple[str, ...]:
    """Names with commas between them, in the order of SERVED. Raises ConfigError."""
    return known_served(text.split(","))


def known_served(names: Iterable[str]) -> tuple[str, ...]:
    """The same names in the order of SERVED. Raises ConfigError."""
    given = list(names)
    if not given or set(given) - set(SERVED) or len(set(given)) != len(given):
        raise ConfigError(f"{','.join(given)!r} cannot be served: give {', '.join(SERVED)}, or {','.join(SERVED)}")
    return tuple(name for name in SERVED if name in given)


def models_of(served: Sequence[str]) -> tuple[str, ...]:
    """The models of the repository, steps before the ensemble."""
    return (*(STAGES if ENSEMBLE in served else ()), *served)


def lookups_of(served: Sequence[str]) -> tuple[str, ...]:
    """Those of LOOKUP_MODELS that run."""
    return tuple(LOOKUPS[name] for name in served)


def require_served(model: str, served: Sequence[str], where: str) -> None:
    """Raises ConfigError that names what is served ``where`` instead of a model."""
    if model not in served:
        raise ConfigError(f"{where} serves {' and '.join(served)}, not {model}: ask for what it serves")
