"""Errors that a user can act on. Each message says what is wrong, where, and what to do."""

from __future__ import annotations


class HstuTrtError(Exception):
    """Base of every error that this project raises on purpose; the command line prints it without a traceback."""

    exit_code = 2


class ConfigError(HstuTrtError):
    """A model config, limit or option is wrong or incomplete."""


class InputError(HstuTrtError):
    """A request or input file is wrong. Names tensor or feature, position and value."""


class ArtefactError(HstuTrtError):
    """A file handed over between rooms is missing, damaged, stale or foreign. Names the command that makes it."""


class DeviceMemoryError(HstuTrtError):
    """The GPU has not enough free memory for what was asked just now; a smaller or later request may do."""

    exit_code = 1


class GateError(HstuTrtError):
    """A measured figure lies beyond its gate (accuracy, parity, regression)."""

    exit_code = 1
