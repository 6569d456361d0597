"""Rows <-> quantised rows with one scale per row.

    int8_sym_row   value = code * scale,  code = round(x / scale) in [-127, 127],  scale = max|x| / 127
    e4m3_row       value = code * scale,  code = e4m3(x / scale),                  scale = max|x| / 448

Rounding is to nearest even. The product is taken in float32; another output dtype rounds once more. Rowwise int8 is
two to four times more exact than e4m3 with the same bytes, so it is the default.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.shards import QuantisedRows

INT8_MAX = 127.0
E4M3_MAX = 448.0
_E4M3_SMALLEST_NORMAL = np.float32(2.0**-6)
_BIAS = np.uint32((127 - 7) << 3)
_ROUNDS_SUBNORMALS = np.float32(2.0**14)
_E4M3_NAN = 0x7F


def quantise_rows(rows: NDArray, dtype: str) -> QuantisedRows:
    """Finite rows ``[n, dim]`` -> ``int8`` or ``float8_e4m3fn`` rows. A row of zeros has the scale 0."""
    rows = rows.astype(np.float32, copy=False)
    largest = np.abs(rows).max(axis=1, initial=0.0)
    scale = (largest / np.float32(INT8_MAX if dtype == "int8" else E4M3_MAX)).astype(np.float32)
    # A scale that is so small that it became 0 would make infinities: such a row counts as zeros.
    divisor = scale[:, None]
    scaled = np.divide(rows, divisor, out=np.zeros_like(rows), where=divisor > 0)
    if dtype == "int8":
        return QuantisedRows(np.clip(np.rint(scaled), -INT8_MAX, INT8_MAX).astype(np.int8), scale)
    return QuantisedRows(encode_e4m3(scaled), scale)


def dequantise_rows(rows: QuantisedRows, dtype: str) -> NDArray:
    """Quantised rows -> float32 ``[n, dim]``."""
    codes = rows.values.astype(np.float32) if dtype == "int8" else E4M3_VALUES[rows.values]
    return codes * rows.scale[:, None]


def encode_e4m3(values: NDArray) -> NDArray:
    """float32 -> the bits of e4m3 in uint8, rounded to nearest even; beyond 448 it stays 448."""
    values = values.astype(np.float32, copy=False)
    magnitude = np.minimum(np.abs(values), np.float32(E4M3_MAX))
    bits = magnitude.view(np.uint32)
    # Rounds the mantissa from 23 to 3 bits, then moves the exponent's bias from 127 to 7.
    normal = ((bits + np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - _BIAS
    # The sum's last place is 2^-9, that of subnormal codes: the addition rounds.
    subnormal = (magnitude + _ROUNDS_SUBNORMALS).view(np.uint32) - _ROUNDS_SUBNORMALS.view(np.uint32)
    code = np.where(magnitude < _E4M3_SMALLEST_NORMAL, subnormal, normal).astype(np.uint8)
    return np.asarray(code | ((values.view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)).astype(np.uint8))


def _e4m3_values() -> NDArray:
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(code & 127) == _E4M3_NAN] = np.nan
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)


E4M3_VALUES = _e4m3_values()
"""float32 ``[256]``: the value of each e4m3 code."""
