"""The kernel benchmark's table and picture, and that docs/speed.md shows the committed rows."""

import dataclasses
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hstu_trt.bench.kernels.cases import all_cases, table_cases
from hstu_trt.bench.kernels.plot import plot
from hstu_trt.bench.kernels.report import BEST_PEERS, case_table, page_table, readme_table
from hstu_trt.bench.kernels.variants import GEMM_CASE, GEMM_NAMES, REFERENCES
from hstu_trt.bench.report.svg import LogScale, Picture, spread_apart
from hstu_trt.bench.result_rows import RESULTS, ResultRow, append_rows, read_rows
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ArtefactError

SPEED_PAGE = Path(__file__).resolve().parents[2] / "docs" / "speed.md"
ROW = ResultRow(
    suite="kernels",
    case="B4 4x128",
    variant="fp16",
    device="NVIDIA H100 80GB HBM3",
    date="2026-11-22T10:00:00Z",
    commit="abcdef",
    versions={},
    median_us=520.04,
    spread=0.0123,
    tflops=636.1,
    gbps=290.2,
    ratio_to={REFERENCES["eager"]: 23.04, REFERENCES["cudnn"]: 1.126, GEMM_NAMES["fp16"]: 0.924},
    checks={"relative_l2": 2.93e-4, "non_finite": 0.0},
)


def rows() -> list[ResultRow]:
    """A row for each of our variants of each case, and the GEMMs."""
    ours = [
        dataclasses.replace(ROW, case=case.name, variant=variant, tflops=case.flops / 520 / 1e6)
        for case in all_cases()
        for variant in case.variants
    ]
    gemms = [
        dataclasses.replace(ROW, case=GEMM_CASE, variant=name, tflops=700.0, ratio_to={}, checks={})
        for name in GEMM_NAMES.values()
    ]
    return [*ours, *gemms]


def test_one_line_per_row() -> None:
    reference = dataclasses.replace(ROW, variant=REFERENCES["eager"], gbps=None, ratio_to={}, checks={})
    header, line, other = case_table([ROW, reference]).splitlines()
    assert re.split(r"  +", line) == [
        "B4 4x128", "fp16", "520.0", "1.2 %", "636", "290", "92 %", "23.0", "1.13", "350 us tensor", "2.9e-04",
    ]  # fmt: skip
    for name in ("us", "TFLOP/s", "GB/s", "GEMM", "x eager", "x compile", "x cudnn", "x flash", "floor", "error"):
        assert name in header
    assert other.split("  ")[1].strip() == REFERENCES["eager"]


def test_the_table_shows_the_newest_rows_in_the_order_of_the_cases() -> None:
    older = dataclasses.replace(ROW, date="2026-11-21T10:00:00Z", tflops=1.0)
    text = page_table([*rows(), older, dataclasses.replace(ROW, suite="engines", case="B1 4x128")])
    source, _, header, ruler, *lines = text.splitlines()
    assert source == "Measured on NVIDIA H100 80GB HBM3, 2026-11-22, commit `abcdef`."
    assert len({line.count("|") for line in (header, ruler, *lines)}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(cells) == sum(len(case.variants) for case in table_cases())
    names = list(dict.fromkeys(line[0] for line in cells))
    assert names == [case.name for case in table_cases()]
    assert [line[1] for line in cells if line[0] == "B4 4x128"] == [
        "`fp16`", "`bf16`", "`fp8`", "`fp8 packed`", "`smxx fp16`",
    ]  # fmt: skip
    assert cells[0] == [
        "B4 4x128", "`fp16`", "520.0", "636", "92 %", "23.0", "", "1.13", "", "350 us tensor", "2.9e-04", "574 TFLOP/s",
    ]  # fmt: skip


def test_the_readme_shows_what_has_a_peer() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme_table(rows()).splitlines()[4:]]
    shown = {(case, variant.strip("`").removesuffix(" packed")) for case, variant, *_ in lines}
    assert shown == set(BEST_PEERS) and len(lines) == len(BEST_PEERS)
    assert "`fp8`" not in {line[1] for line in lines}, "the model runs fp8 packed"
    assert lines[0] == ["B4 4x128", "`fp16`", "520.0", "636", "", "574 TFLOP/s"]


def test_peers_belong_to_cases() -> None:
    variants = {(case.name, variant) for case in table_cases() for variant in case.variants}
    assert set(BEST_PEERS) <= variants


def test_the_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "rows.jsonl", tmp_path / "kernels.svg"
    append_rows(path, rows())
    assert main(["bench", "table-kernels", "--rows", str(path)]) == 0
    assert capsys.readouterr().out == page_table(rows()) + "\n"
    assert main(["bench", "table-attention", "--rows", str(path)]) == 0
    assert capsys.readouterr().out == readme_table(rows()) + "\n"
    assert main(["bench", "plot-kernels", "--rows", str(path), "--out", str(picture)]) == 0
    assert picture.read_text() == plot(rows())


def test_without_rows_there_is_nothing_to_show() -> None:
    for show in (page_table, readme_table, plot):
        with pytest.raises(ArtefactError, match="make bench-kernels"):
            show([])


def test_the_picture_is_whole() -> None:
    text = plot(rows())
    root = ElementTree.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter():
        points = [tuple(map(float, point.split(","))) for point in element.attrib.get("points", "").split()]
        points += [
            (float(element.attrib[x]), float(element.attrib[y]))
            for x, y in (("x", "y"), ("cx", "cy"))
            if x in element.attrib
        ]
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points), element.attrib
    words = "".join(root.itertext())
    for case in table_cases():
        assert (f"M-FALCON {case.candidates}q" if case.cached else case.name) in words
    assert "prefers-color-scheme: dark" in text and "commit abcdef" in words and "GEMM fp8 700" in words


def test_some_rows_make_a_picture() -> None:
    assert "<svg" in plot([ROW])


def test_labels_are_spread_apart() -> None:
    moved = spread_apart([100.0, 10.0, 101.0, 99.0], 12)
    assert moved == [100.0, 10.0, 112.0, 88.0]
    assert spread_apart([], 12) == []
    ordered = sorted(spread_apart([5.0] * 4 + [30.0], 12))
    assert all(b - a >= 12 for a, b in pairwise(ordered))


def test_scales_and_escapes() -> None:
    scale = LogScale((10, 1000), (0, 100))
    assert [scale(10), scale(100), scale(1000)] == pytest.approx([0, 50, 100])
    picture = Picture(10, 10, "a < b")
    picture.text((1, 1), "x & y")
    assert "a &lt; b" in picture.render() and "x &amp; y" in picture.render()


def test_the_page_shows_the_committed_rows() -> None:
    files = sorted(RESULTS.glob("kernels_*.jsonl"))
    assert files
    assert page_table(read_rows(files)) in SPEED_PAGE.read_text(), "make speed-page puts the newest rows there"
