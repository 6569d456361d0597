"""The attention norm as people write it."""

from __future__ import annotations

import pytest

from hstu_trt.contract.attention_norm import parse_attention_norm, parse_fixed_norm
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.presets import debug

NORMS = {"fixed:100": 100.0, "fixed:0.5": 0.5, "batch_max": None, None: 512.0}


@pytest.mark.parametrize("text", NORMS)
def test_norms(text: str | None) -> None:
    assert parse_attention_norm(text, debug()) == NORMS[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fixed",
        "fixed:",
        "fixed:0",
        "fixed:-1",
        "fixed:nan",
        "fixed:inf",
        "max",
        "x:1",
        "fixed:1e-300",
        "fixed:1e300",
    ],
)
def test_bad_norms(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected fixed:<N> with N > 0"):
        parse_attention_norm(text, debug())


def test_a_deployment_takes_no_batch_max() -> None:
    with pytest.raises(ConfigError, match="never for a deployment"):
        parse_fixed_norm("batch_max")
