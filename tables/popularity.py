"""Which share of lookups the most popular rows answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError

UNIFORM = "uniform"
"""Every row alike: the law of MLPerf's DLRMv3 data."""


def zipf_share(hot: int, rows: int, exponent: float) -> float:
    """Share of lookups that the ``hot`` most popular of ``rows`` rows answer, P(rank r) ~ r ** -exponent.

    The power law is integrated from 1 to ``rows + 1``, as ``bench/workloads/popularity.py`` draws from it.
    """
    hot = min(max(hot, 0), rows)
    if not hot:
        return 0.0
    if exponent == 1.0:
        return float(np.log1p(hot) / np.log1p(rows))
    power = 1.0 - exponent
    return float(np.expm1(power * np.log1p(hot)) / np.expm1(power * np.log1p(rows)))


def histogram_share(hot: int, counts: NDArray) -> float:
    """Share of lookups that the ``hot`` largest of the counts make up."""
    total = float(counts.sum(dtype=np.float64))
    if not total or hot <= 0:
        return 0.0
    largest = np.sort(counts.astype(np.float64))[::-1][: min(hot, len(counts))]
    return float(largest.sum() / total)


class Popularity:
    """A law, or counts of what was seen."""

    def __init__(self, text: str) -> None:
        """``uniform``, ``zipf:EXPONENT``, or a .npy file with a count per id. Raises HstuTrtError."""
        self.text = text
        kind, _, exponent = text.partition(":")
        self._counts: NDArray | None = None
        self._exponent = 0.0
        if kind == "zipf":
            try:
                self._exponent = float(exponent)
            except ValueError:
                self._exponent = -1.0
            if not 0 <= self._exponent <= 10:
                raise ConfigError(f"popularity {text!r}: an exponent is a number from 0 to 10, as in zipf:1.05")
        elif text != UNIFORM:
            self._counts = _read_counts(Path(text))

    def hit_rate(self, hot: int, rows: int) -> float:
        """Share of lookups that the ``hot`` most popular rows answer."""
        if self._counts is not None:
            if len(self._counts) > rows:
                raise InputError(f"{self.text} counts {len(self._counts)} ids, the table has {rows} rows")
            return histogram_share(hot, self._counts)
        return zipf_share(hot, rows, self._exponent)


def _read_counts(path: Path) -> NDArray:
    if not path.is_file():
        raise ConfigError(f"popularity {str(path)!r}: expected uniform, zipf:EXPONENT or a .npy file of counts")
    try:
        counts: NDArray = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise ArtefactError(f"{path} is not a .npy file ({error})") from None
    if counts.ndim != 1 or counts.dtype.kind not in "iuf" or not np.isfinite(counts).all() or (counts < 0).any():
        raise InputError(f"{path} must hold one count >= 0 per id, got {counts.dtype} {list(counts.shape)}")
    return counts
