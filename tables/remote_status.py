"""Where each row of a lookup came from."""

from __future__ import annotations

from enum import IntEnum


class RowStatus(IntEnum):
    """Where a row came from, one uint8 per id."""

    GPU = 0
    HOST = 1
    REMOTE = 2
    MISSING = 3
    """Not in any tier, or refused for its length: a default row."""
    BAD_ID = 4
    """Outside the table: the policy's row."""
    UNAVAILABLE = 5
    """Its tier could not be asked: a default row."""
    PADDING = 6
    """The padding id: a row of zeros."""
