"""The report: complete, self-contained, and closed to speed without checks."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from load_rows_made import a_run, later, load_row

from hstu_trt.bench.report import verb as report
from hstu_trt.bench.report.cases import cases_of
from hstu_trt.bench.result_rows import RESULTS, append_rows, read_rows
from hstu_trt.contract.errors import ArtefactError, GateError

VOID = {"meta", "br", "rect", "circle", "polyline", "line"}


class Checker(HTMLParser):
    """Notes what a page would load, and tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and checker.loads == []
    assert "<script" not in html and "url(" not in html and "@import" not in html
    assert 'name="viewport"' in html
    return html


def test_a_page_has_every_part():
    kernels = read_rows([RESULTS / "kernels_h100.jsonl", RESULTS / "tables_cpu.jsonl"])
    beside = dataclasses.replace(
        load_row("offline", "64 in flight"), case="debug, beside PyTorch eager", ratio_to={"pytorch_eager": 3.0}
    )
    theirs = load_row("closed", "4 in flight by perf_analyzer", client="perf_analyzer", to_ours={"per_s": 1.02})
    html = check(report.page([*a_run(), *later(a_run()), beside, theirs, *kernels]))
    for part in (
        "At a glance", "Latency over throughput", "bound 80 ms", "Where the time goes", "Batch sizes", "Roofline",
        "Accuracy of the same served models", "5 of 5 gates", "Beside PyTorch eager", "perf_analyzer and our client",
        "Against the run before", "no regression", "<summary>workload", "<summary>environment", "Suite tables cpu",
        "every score kept its gates", "Nothing here is an MLPerf result",
    ):  # fmt: skip
        assert part in html, part


def test_speed_without_checks_is_refused():
    unchecked = dataclasses.replace(load_row("single"), checks={})
    with pytest.raises(
        GateError, match=r"speed without a check of the scores is not reported: .* / ranking_fused single"
    ):
        report.page([*a_run(), unchecked])


def test_a_missed_gate_is_said_at_the_top():
    wrong = dataclasses.replace(load_row("single"), checks={"gates": 5.0, "gates_failed": 2.0})
    html = check(report.page([wrong]))
    assert "1 runs miss an accuracy gate" in html and "2 of 5 gates MISSED" in html


def test_a_bound_that_was_not_kept_is_said():
    found = {"rate": 200.0, "bound": "p99 <= 80 ms", "kept": False, "probes": []}
    html = check(report.page([load_row("server", "p99 <= 80 ms", asked=200.0, found=found)]))
    assert 'class="bad">200.0 (p99 &lt;= 80 ms: MISSED)' in html


def test_a_regression_is_said():
    slow = [dataclasses.replace(row, median_us=row.median_us * 3) for row in later(a_run())]
    html = check(report.page([*a_run(), *slow]))
    assert "figures WORSE" in html and 'class="bad">WORSE' in html


def test_runs_do_not_mix():
    """A later run with other rates replaces the curve; scenarios that it lacks stay."""
    rows = [*a_run(), *later([load_row("open", "70.0/s"), load_row("open", "90.0/s")])]
    (case,) = cases_of(rows)
    fused = [row.variant for row in case.of("open") if row.details["served"] == "ranking_fused"]
    assert fused == ["ranking_fused open 70.0/s", "ranking_fused open 90.0/s"]
    assert len(case.of("single")) == 2 and len(case.earlier) == 3


def test_markup_in_names_is_escaped():
    row = dataclasses.replace(load_row("single"), case="<b>&", device="<script>")
    html = check(report.page([row]))
    assert "&lt;b&gt;&amp;" in html


def test_nothing_to_report():
    with pytest.raises(ArtefactError, match="no rows to report"):
        report.page([])


def test_the_verb_writes_page_and_pictures(tmp_path, capsys):
    rows, out, folder = tmp_path / "rows.jsonl", tmp_path / "r" / "report.html", tmp_path / "pictures"
    append_rows(rows, a_run())
    assert (
        report.main(["--results", str(rows), "--out", str(out), "--pictures", str(folder), "--against", str(rows)]) == 0
    )
    check(out.read_text())
    pictures = sorted(path.name for path in folder.iterdir())
    assert pictures == ["serving_curve.svg", "serving_steps.svg"]
    assert all(re.match(r"<svg xmlns=", (folder / name).read_text()) for name in pictures)


def test_the_committed_rows_make_a_page():
    check(report.page(read_rows(sorted(RESULTS.glob("*.jsonl")))))
