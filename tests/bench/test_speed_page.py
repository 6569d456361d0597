"""The tables of docs that are written by hand: each figure is that of a committed row."""

import itertools
import re
from pathlib import Path

import pytest

from hstu_trt.bench.result_rows import RESULTS, latest, read_rows

ROOT = Path(__file__).parents[2]
SPEED = (ROOT / "docs" / "speed.md").read_text()


def table_under(header, page=SPEED):
    """The rows of the Markdown table whose header begins so, cells as text."""
    lines = page.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(header)) + 2
    found = itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def number(cell):
    return float(re.match(r"[0-9,.]+", cell)[0].replace(",", ""))


def rows_of(file, case):
    return {row.variant: row for row in latest(read_rows([RESULTS / file])).values() if row.case == case}


@pytest.mark.parametrize("case", ["B4 4x128", "B16 4x128", "B4 8x64", "B4 2x256"])
def test_attention_under_constant_load(case):
    rows = rows_of("kernels_sustained_h100.jsonl", case)
    cells = next(line for line in table_under("| case | ours fp16 |") if line[0] == case)
    shown = {"fp16": cells[1], "sdpa cudnn fp16 (softmax)": cells[3], "fp8 packed": cells[4]}
    assert {name: round(rows[name].tflops) for name in shown} == {name: number(cell) for name, cell in shown.items()}


@pytest.mark.parametrize(("precision", "column"), [("fp16", 1), ("fp8", 2)])
def test_dlrm_v3_served_on_a_gpu(precision, column):
    rows = rows_of("serve_h100.jsonl", f"dlrm_v3 {precision} cuda, profile gpu_mlperf, seed 1001")
    offline, bound, single, opened = (
        [line[column] for line in table_under("| | fp16 | fp8 |")][n] for n in (0, 2, 3, 4)
    )
    assert number(offline) == round(rows["ranking_fused offline 64 in flight"].per_s)
    assert number(single) == round(rows["ranking_fused single"].details["run"]["latency_ms"]["p50"], 1)
    server, at_100 = rows.get("ranking_fused server p99 <= 80 ms"), rows.get("ranking_fused open 100/s")
    if server is None:
        assert "no row" in bound and not opened
        return
    repeats = sorted(round(one["p99"]) for one in server.details["repeats"])
    assert bound == f"{server.per_s:.0f}: two runs, p99 {repeats[0]} and {repeats[1]} ms"
    assert opened == f"{at_100.median_us / 1e3:.1f} ms, {at_100.details['run']['latency_ms']['p99']:.0f} ms"


SERVED = ["pytorch_eager", "pytorch_eager_per_core", "ranking", "ranking_fused"]


@pytest.mark.parametrize("place", range(4), ids=SERVED)
def test_beside_pytorch_eager_on_a_cpu(place):
    served, line = SERVED[place], table_under("| served | offline, requests/s |")[place]
    rows = rows_of("serve_cpu.jsonl", "debug fp32 cpu, profile ci, seed 1001, beside PyTorch eager")
    offline, opened = rows[f"{served} offline 64 in flight"], rows[f"{served} open 90.17/s"]
    assert number(line[1]) == round(offline.per_s)
    assert number(line[3]) == round(opened.details["run"]["latency_ms"]["p99"])
    for cell, row, name in ((line[2], offline, SERVED[1]), (line[4], opened, f"{SERVED[1]} p99")):
        if served.startswith("ranking"):
            assert number(cell) == pytest.approx(row.ratio_to[name], abs=0.006)


@pytest.mark.parametrize("model", ["ranking", "ranking_fused"])
def test_requests_during_refreshes(model):
    page = (ROOT / "docs" / "tables.md").read_text()
    cells = next(line for line in table_under("| p50 / p99 of a request |", page) if line[0] == f"`{model}`")
    rows = rows_of("refresh_cpu.jsonl", f"demo fp32, {model}, 2 clients")
    shown = [f"{row.median_us / 1e3:.1f} / {row.checks['p99_us'] / 1e3:.1f} ms" for row in rows.values()]
    assert cells[1:] == shown
