"""Comparing tensors: what passes, what does not, and that the table of tolerances is whole."""

import numpy as np
import pytest

from hstu_trt.contract.errors import GateError
from hstu_trt.contract.numerics import TOLERANCES, Tolerance, check, compare
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, PRECISIONS, STAGES

NAN, INF = np.nan, np.inf


def array(*values):
    return np.asarray(values, dtype=np.float32)


def test_the_worst_element_is_located():
    report = compare("x", array(1, 2, 3.5).reshape(3, 1), array(1, 2, 3).reshape(3, 1))
    assert (report.max_abs, report.worst) == (0.5, (2, 0))
    assert (report.actual_at_worst, report.expected_at_worst) == (3.5, 3.0)
    assert report.rel_l2 == pytest.approx(0.5 / np.sqrt(14))
    assert "max |difference| 0.5 at [2, 0] (3.5 instead of 3)" in report.text()


@pytest.mark.parametrize(
    ("actual", "expected", "mismatches"),
    [
        (array(NAN), array(NAN), 0),
        (array(INF, -INF), array(INF, -INF), 0),
        (array(NAN), array(1), 1),
        (array(1), array(NAN), 1),
        (array(INF), array(-INF), 1),
        (array(INF, NAN, 1), array(NAN, NAN, 1), 1),
    ],
)
def test_nan_and_inf_must_stand_at_the_same_places(actual, expected, mismatches):
    report = compare("x", actual, expected)
    assert report.nonfinite_mismatch == mismatches
    assert report.passes(Tolerance(1e9, "planted")) == (mismatches == 0)
    assert ("NaN or Inf on one side only" in report.text()) == (mismatches > 0)


def test_empty_tensors_agree():
    report = compare("x", np.zeros((0, 3)), np.zeros((0, 3)))
    assert report.passes(Tolerance(0.0, "planted"))
    assert report.worst == ()


def test_zero_against_zero_has_no_relative_error():
    assert compare("x", array(0, 0), array(0, 0)).rel_l2 == 0.0


@pytest.mark.parametrize(("actual", "expected"), [((2,), (3,)), ((2, 1), (2,)), ((0,), (1,))])
def test_another_shape_is_a_failed_gate(actual, expected):
    with pytest.raises(GateError, match=r"x: shape .* instead of"):
        compare("x", np.zeros(actual), np.zeros(expected))


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (0.5, True), (0.500001, False)])
def test_the_tolerance_is_inclusive(error, passes):
    report = compare("x", np.asarray([1.0 + error]), np.asarray([1.0]))
    assert report.passes(Tolerance(0.5, "planted")) is passes


def test_integers_and_booleans_are_compared_by_value():
    assert compare("x", np.asarray([True, False]), np.asarray([1, 2])).max_abs == 2.0


def test_check_names_figure_and_tolerance():
    assert check("ranking", "fp32", array(0.5), array(0.5)).max_abs == 0.0
    with pytest.raises(GateError, match=r"scores: max .* tolerance for ranking in fp32 is 2e-05"):
        check("ranking", "fp32", array(0.6), array(0.5), name="scores")


@pytest.mark.parametrize("stage", [*STAGES, ENSEMBLE, FUSED, "stu"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_stage_and_precision_has_a_tolerance(stage, precision):
    assert TOLERANCES[stage, precision].source
