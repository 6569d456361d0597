"""Checks of the fields of a config: each says which field has which value, and what it must be."""

from __future__ import annotations

import math

from hstu_trt.contract.errors import ConfigError


class FieldError(ConfigError):
    """A field of a config has a value that it cannot have."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field, self.problem = field, problem


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def require_whole(config: object, *names: str, least: int = 1) -> None:
    """That fields are whole numbers: 2.0, True and "2" are none. Raises FieldError."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < least:
            bound = f"> {least - 1}" if least else ">= 0"
            raise FieldError(name, f"must be a whole number {bound}, got {value!r}")


def require_names(config: object, *names: str) -> None:
    """That fields are texts. Raises FieldError."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, str):
            raise FieldError(name, f"must be a feature's name, got {value!r}")


def is_finite(value: object) -> bool:
    """Whether a value is a number, and neither NaN nor Inf."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
