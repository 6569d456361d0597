"""Numbers and lists as options take them."""

import pytest

from hstu_trt.contract.text import names_in, number_in


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("007", 7), ("9" * 18, 10**18 - 1)])
def test_a_whole_number_is_read(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize("text", ["", " 1", "-1", "+1", "1.0", "1_000", "x", "\u00b2", "\u0663", "9" * 19, "9" * 5000])
def test_anything_else_is_none(text):
    """Superscripts too, which are digits to Python and no number; and what no 64 bits hold."""
    assert number_in(text) is None


def test_names_stand_between_commas():
    assert names_in(" hstu, mlp_head,,") == ("hstu", "mlp_head")
