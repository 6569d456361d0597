"""Packing of waiting users into micro-batches by token count, and the sizes that batches are rounded to.

A captured graph has fixed shapes. A batch is laid out in the next larger bucket, and one more user, the filler, owns
the rows that are left over: so every row belongs to somebody, candidates begin at a fixed row, and no kernel needs to
know about padding. The filler's few rows attend to each other and to nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

_LEAST_STEP = 128
FINE_STEPS = 64
"""Bucket sizes per doubling of the rows: at most 1.6 % more from 8,192 rows on."""


class Size(NamedTuple):
    """Tokens of one user."""

    prefix: int
    """Contextual tokens and history."""
    candidates: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.candidates


class Bucket(NamedTuple):
    """Shape of a captured batch, the filler included."""

    prefix: int
    candidates: int
    users: int

    @property
    def tokens(self) -> int:
        return self.prefix + self.candidates


def bucket_of(sizes: Sequence[Size], steps: int = FINE_STEPS) -> Bucket:
    """The smallest bucket that holds some users and a filler."""
    return Bucket(
        rounded_rows(sum(size.prefix for size in sizes), steps),
        rounded_rows(sum(size.candidates for size in sizes), steps),
        1 << len(sizes).bit_length(),
    )


def rounded_rows(rows: int, steps: int = FINE_STEPS) -> int:
    """The next multiple of 128, or of a ``steps``-th of the power of two below it."""
    step = max(_LEAST_STEP, (1 << max(rows.bit_length() - 1, 0)) // steps)
    return max(1, -(-rows // step)) * step


def pack(sizes: Sequence[Size], *, max_tokens: int, max_users: int) -> Iterator[range]:
    """Cuts a queue into runs of users, in its order, each of at most so many tokens and users; one user may be more."""
    first, tokens = 0, 0
    for number, size in enumerate(sizes):
        if number > first and (tokens + size.tokens > max_tokens or number - first == max_users):
            yield range(first, number)
            first, tokens = number, 0
        tokens += size.tokens
    if first < len(sizes):
        yield range(first, len(sizes))
