"""The attention norm N as people write it: ``fixed:<N>`` or ``batch_max``."""

from __future__ import annotations

import numpy as np

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import HstuConfig

BATCH_MAX = "batch_max"


def parse_attention_norm(text: str | None, config: HstuConfig) -> float | None:
    """``fixed:<N>`` -> N; ``batch_max`` -> None, the reference's way; None -> the config's ``max_seq_len``."""
    if text is None:
        return float(config.max_seq_len)
    return None if text == BATCH_MAX else parse_fixed_norm(text)


def parse_fixed_norm(text: str) -> float:
    """``fixed:<N>`` -> N; a deployment takes nothing else, so that scores do not depend on who shares a batch."""
    kind, _, number = text.partition(":")
    try:
        norm = float(number)
    except ValueError:
        norm = 0.0
    with np.errstate(over="ignore"):
        single = float(np.float32(norm))  # what the graph takes
    if kind != "fixed" or not 0 < single < float("inf"):
        raise ConfigError(
            f"attention norm {text!r}: expected fixed:<N> with N > 0, e.g. fixed:16384 "
            f"({BATCH_MAX} is for parity runs of score and accuracy, never for a deployment)"
        )
    return norm
