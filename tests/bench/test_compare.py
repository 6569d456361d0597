"""Verdicts on rows before and after a change."""

import dataclasses
import json
import subprocess

import pytest
from load_rows_made import a_run, later, load_row

from hstu_trt.bench import compare
from hstu_trt.bench.result_rows import RESULTS, append_rows
from hstu_trt.contract.errors import ArtefactError, ConfigError


def slower(row, factor, **details):
    run = {**row.details["run"], "latency_ms": {n: v * factor for n, v in row.details["run"]["latency_ms"].items()}}
    return dataclasses.replace(
        row, median_us=row.median_us * factor, per_s=row.per_s / factor, details={**row.details, "run": run, **details}
    )


def verdicts(a, b, **options):
    verdict = compare.compare_rows([a], [b], **options)
    return {change.figure: change.verdict for change in verdict.changes}, verdict.passed


OFFLINE = load_row("offline", "64 in flight")
WIDE = {"per_s": 0.2, "p50": 0.2, "p99": 0.2}
WILD = {"per_s": 0.8, "p50": 0.8, "p99": 0.8}
CASES = {
    "the same": (1.0, {}, {"median us": "same", "p99 ms": "same", "req/s": "same"}, True),
    "within the floor": (1.04, {}, {"median us": "same", "p99 ms": "same", "req/s": "same"}, True),
    "worse": (1.3, {}, {"median us": "WORSE", "p99 ms": "WORSE", "req/s": "WORSE"}, False),
    "better": (0.7, {}, {"median us": "better", "p99 ms": "better", "req/s": "better"}, True),
    "worse within its spread": (
        1.3,
        {"spread": WIDE},
        {"median us": "WORSE", "p99 ms": "same", "req/s": "same"},
        False,
    ),
    "too noisy to say": (1.3, {"spread": WILD}, {"median us": "WORSE", "p99 ms": "noisy", "req/s": "noisy"}, False),
}


@pytest.mark.parametrize(("factor", "details", "expected", "passed"), CASES.values(), ids=CASES.keys())
def test_verdicts_know_the_spread(factor, details, expected, passed):
    assert verdicts(OFFLINE, slower(OFFLINE, factor, **details)) == (expected, passed)


def test_the_row_s_own_spread_counts_for_its_median():
    wide = dataclasses.replace(slower(OFFLINE, 1.3, spread=WIDE), spread=0.2)
    assert verdicts(OFFLINE, wide) == ({"median us": "same", "p99 ms": "same", "req/s": "same"}, True)


def test_the_rate_of_an_open_loop_is_no_figure():
    row = load_row("open", "50/s")
    assert "req/s" not in verdicts(row, row)[0]


def test_rows_of_other_suites_have_their_time_alone():
    kernel = dataclasses.replace(OFFLINE, suite="kernels", details={})
    assert verdicts(kernel, kernel) == ({"median us": "same"}, True)


def test_details_of_another_suite_are_no_load_run():
    """Rows of overload and accuracy have details of their own."""
    row = dataclasses.replace(OFFLINE, suite="overload", details={"setting": {"factor": 3.0}, "missed": []})
    assert verdicts(row, row) == ({"median us": "same"}, True)


def test_the_committed_rows_compare_with_themselves(capsys):
    assert compare.main([str(RESULTS), str(RESULTS)]) == 0
    assert "no regression" in capsys.readouterr().out


PROBLEMS = {
    "a missed gate": ({"checks": {"gates": 5.0, "gates_failed": 1.0}}, "1 gates of its scores are missed"),
    "no checks": ({"checks": {}}, "has no checks any more"),
    "no longer valid": ({"details": {**OFFLINE.details, "flags": ["errors"]}}, "was valid in A, in B: errors"),
}


@pytest.mark.parametrize(("changes", "said"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_speed_alone_does_not_pass(changes, said):
    verdict = compare.compare_rows([OFFLINE], [dataclasses.replace(OFFLINE, **changes)])
    assert not verdict.passed and said in verdict.problems[0] and "REGRESSION" in compare.text(verdict)


def test_the_newest_rows_are_compared_and_the_rest_is_named():
    old = [*a_run(), slower(dataclasses.replace(OFFLINE, date="2026-11-21T00:00:00Z"), 9.0)]
    verdict = compare.compare_rows(old, [*later(a_run())[1:], load_row("closed", "4 in flight")])
    assert verdict.passed and len(verdict.only_a) == 1 and len(verdict.only_b) == 1


def test_other_devices_are_named():
    verdict = compare.compare_rows([OFFLINE], [dataclasses.replace(OFFLINE, device="another")])
    assert verdict.devices == ("a CPU", "another") and "different devices" in compare.text(verdict)


def test_nothing_in_common_is_an_error():
    with pytest.raises(ConfigError, match="no row in common"):
        compare.compare_rows([OFFLINE], [load_row("single")])


def test_the_verb(tmp_path, capsys):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    append_rows(a, [OFFLINE])
    append_rows(b, [slower(OFFLINE, 1.5)])
    assert compare.main([str(a), str(a)]) == 0 and compare.main([str(a), str(b)]) == 1
    assert "REGRESSION: 3 figures worse" in capsys.readouterr().out
    assert compare.main([str(a), str(b), "--floor", "0.6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_commits_are_sides(tmp_path, monkeypatch):
    results = tmp_path / "bench" / "results"
    append_rows(results / "serve_cpu.jsonl", [OFFLINE])

    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@t", *words], check=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "rows")
    monkeypatch.setattr(compare, "__file__", str(tmp_path / "bench" / "compare.py"))
    assert compare.read_side("HEAD") == [OFFLINE]
    assert compare.read_side(str(results)) == [OFFLINE]
    (results / "serve_cpu.jsonl").write_text("{not JSON}\n")
    git("commit", "-qam", "damaged")
    with pytest.raises(ArtefactError, match=r"HEAD:bench/results/serve_cpu.jsonl:1 is not JSON"):
        compare.read_side("HEAD")
    with pytest.raises(ArtefactError, match="neither a file"):
        compare.read_side("no-such-commit")
