"""The probes behind the markers, on a planted test: what is missing is told, and never skipped silently in CI."""

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PLANTED = """
import pytest

@pytest.mark.{marker}
def test_planted():
    pass
"""


def run_planted(pytester: pytest.Pytester, marker: str, conftest_tail: str) -> pytest.RunResult:
    conftest = (Path(__file__).parent / "conftest.py").read_text()
    pytester.makeconftest(conftest + f"\n\nPROBES[{marker!r}] = {conftest_tail}\n")
    pytester.makeini(f"[pytest]\nmarkers =\n    {marker}: planted\n")
    pytester.makepyfile(PLANTED.format(marker=marker))
    return pytester.runpytest_subprocess("-rs", "-p", "no:cacheprovider")


@pytest.mark.parametrize("marker", ["triton", "gpu", "tensorrt", "redis", "nginx"])
def test_a_missing_part_is_a_skip_with_a_reason(pytester, monkeypatch, marker):
    monkeypatch.delenv("CI", raising=False)
    result = run_planted(pytester, marker, "lambda: 'planted reason'")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*planted reason*"])


def test_a_missing_tritonserver_fails_in_ci(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    run_planted(pytester, "triton", "lambda: 'planted reason'").assert_outcomes(errors=1)


def test_a_missing_gpu_is_a_skip_in_ci(pytester, monkeypatch):
    monkeypatch.setenv("CI", "true")
    run_planted(pytester, "gpu", "lambda: 'planted reason'").assert_outcomes(skipped=1)


def test_a_present_part_runs(pytester):
    run_planted(pytester, "triton", "lambda: None").assert_outcomes(passed=1)
