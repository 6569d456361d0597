"""The section and picture of tables in docs/speed.md: from the committed rows, ours beside what they replace."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hstu_trt.bench.result_rows import ResultRow, append_rows
from hstu_trt.bench.tables.plot import plot
from hstu_trt.bench.tables.report import page_section, shown_rows, table_main
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ArtefactError

SPEED_PAGE = Path(__file__).parents[2] / "docs" / "speed.md"
FIELDS = {"device": "a CPU", "date": "2026-11-22T10:00:00Z", "commit": "abc", "versions": {}, "spread": 0.1}


def row(suite, case, variant, median_us, **fields):
    return ResultRow(**{**FIELDS, "suite": suite, "case": case, "variant": variant, "median_us": median_us, **fields})


ROWS = [
    row("tables cpu", "fp16 9048", "torch index_select", 200.0, per_s=4e7),
    row("tables cpu", "fp16 9048", "host tier", 100.0, per_s=9e7, gbps=12.0, ratio_to={"torch index_select": 2.0}),
    row("remote", "512 ids", "redis-py pipeline", 9e4, per_s=5e3, ratio_to={"hstu-trt": 0.01}),
    row("remote", "512 ids", "hstu-trt", 900.0, per_s=5e5, ratio_to={"redis-py pipeline": 100.0}),
    row("tables gpu", "fp16 9048", "EmbeddingLookup", 8.0, per_s=1e9, ratio_to={"torch index_select": 3.0}),
]


def test_the_section_shows_ours_tier_by_tier():
    shown = [(tier.name, row.variant) for tier, row in shown_rows(ROWS)]
    assert shown == [("GPU", "EmbeddingLookup"), ("host", "host tier"), ("remote", "hstu-trt")]
    text = page_section(ROWS)
    assert "| host | fp16 9048 | `host tier` | 100 | 10% | 90.00 | 12.0 | torch index_select 2.00 |" in text
    assert "| remote | 512 ids | `hstu-trt` | 900 | 10% | 0.50 | 0.0 | redis-py pipeline 100.0 |" in text
    assert "Measured on a CPU, 2026-11-22, commit `abc`." in text
    assert "| uniform (DLRMv3) | 0.01 % (0.01) |" in text
    assert "under load" not in text


def test_newer_rows_replace_older_ones():
    newer = row("tables cpu", "fp16 9048", "host tier", 50.0, per_s=18e7, date="2026-11-23T10:00:00Z")
    text = page_section([newer, *ROWS])
    assert "| 50.0 |" in text and "| 100 |" not in text


def test_refreshes_are_shown_where_there_are_rows():
    refresh = row("refresh under load", "10 refreshes", "overlay", 5000.0, checks={"p99_ms": 12.25, "failed": 0.0})
    text = page_section([*ROWS, refresh])
    assert "| 10 refreshes | overlay | 5,000 | p99_ms 12.25, failed 0 |" in text


def test_the_picture_leaves_the_other_tiers_room():
    others = [row("tables gpu", f"fp16 {n}", "EmbeddingLookup", 8.0, per_s=1e9) for n in range(40)]
    others += [row("tables gpu", "fp16 9048", "EmbeddingLookup, one output", 8.0, per_s=1e9)]
    words = " ".join(ElementTree.fromstring(plot([*others, *ROWS])).itertext())
    assert words.count("GPU: fp16") == 1
    assert "remote: 512 ids" in words


def test_the_picture_is_whole():
    picture = ElementTree.fromstring(plot(ROWS))
    words = " ".join(picture.itertext())
    assert "GPU: fp16 9048" in words and "Zipf 1.05" in words and "a CPU, 2026-11-22, commit abc" in words
    places = re.findall(r'(?:x|y|cx|cy)="(-?[\d.]+)"', plot(ROWS))
    assert all(0 <= float(place) <= 1040 for place in places)


@pytest.mark.parametrize("draw", [plot, page_section])
def test_nothing_to_show_names_the_command(draw):
    with pytest.raises(ArtefactError, match="make bench-tables"):
        draw([row("kernels", "x", "fp16", 1.0)])


def test_the_commands(tmp_path, capsys):
    append_rows(tmp_path / "rows.jsonl", ROWS)
    files = ["--rows", str(tmp_path / "rows.jsonl")]
    assert main(["bench", "table-lookups", *files]) == 0
    assert "`host tier`" in capsys.readouterr().out
    assert main(["bench", "plot-lookups", *files, "--out", str(tmp_path / "t.svg")]) == 0
    assert (tmp_path / "t.svg").read_text().startswith("<svg")


def test_the_page_shows_the_committed_rows(capsys):
    assert table_main([]) == 0
    section = capsys.readouterr().out.strip()
    assert section in SPEED_PAGE.read_text(), "put what `hstu-trt bench table-lookups` prints there: make speed-page"
