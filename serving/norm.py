"""The attention norm of a deployment."""

from __future__ import annotations

from hstu_trt.contract.errors import ConfigError


def parse_attention_norm(text: str) -> float:
    """``fixed:N`` -> N. Raises ConfigError on anything else."""
    kind, _, number = text.partition(":")
    try:
        norm = float(number)
    except ValueError:
        norm = 0.0
    if kind != "fixed" or not 0 < norm < float("inf"):
        raise ConfigError(
            f"attention norm {text!r}: a deployment needs fixed:N with N > 0, e.g. fixed:16384, so that scores do not "
            "depend on who shares the batch"
        )
    return norm
