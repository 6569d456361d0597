"""The lookup benchmark: its rows are checked before they are timed, and a wrong table is noticed."""

import numpy as np
import pytest

from hstu_trt.bench.result_rows import read_rows
from hstu_trt.bench.tables import host as tables
from hstu_trt.contract.cli import main as command_line

SMALL = ["--rows", "300", "--dim", "16", "--lookups", "70", "--rounds", "2", "--target-ms", "0.1", "--threads", "1"]


@pytest.mark.parametrize("law", [[], ["--zipf", "1.05"]])
def test_rows_of_every_dtype(tmp_path, capsys, law, native_library):
    assert command_line(["bench", "tables", *SMALL, *law, "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = read_rows([tmp_path / "rows.jsonl"])
    assert [row.variant for row in rows] == ["torch index_select", "host tier", "numpy"] * 3
    for ours in rows[1::3]:
        assert ours.checks["rows_that_differ"] == 0.0
        assert ours.ratio_to.keys() == {"torch index_select"}
        assert ours.median_us > 0
    assert "int8 70 of 300 x 16" in capsys.readouterr().out


def test_rows_that_differ_are_counted(native_library):
    case = tables.TableCase(dtype="fp16", rows=300, dim=16, lookups=70, exponent=0.0)
    provenance = tables.Provenance(device="x", date="2026-01-01T00:00:00Z", commit="x", versions={})
    right, blocks = tables.torch_lookup(case), tables.blocks

    def wrong(case):
        return (block + np.float16(1) for block in blocks(case))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "torch_lookup", lambda _: right)
        patch.setattr(tables, "blocks", wrong)
        rows = tables.measure(case, provenance, tables.MeasuringPlan(rounds=1, target_ms=0.1))
    assert rows[1].checks["rows_that_differ"] == 140


def test_the_bytes_of_a_request():
    case = tables.TableCase(dtype="int8", rows=10**6, dim=512, lookups=9048, exponent=0.0)
    assert case.moved_bytes == 9048 * (512 + 4 + 8 + 1024)
    assert case.name == "int8 9048 of 1000000 x 512, uniform"


@pytest.mark.parametrize("option", ["--rows", "--dim", "--lookups", "--rounds", "--threads"])
def test_nothing_to_measure_is_refused(tmp_path, capsys, option):
    assert command_line(["bench", "tables", option, "0", "--out", str(tmp_path / "rows.jsonl")]) == 2
    assert "must be >= 1" in capsys.readouterr().err


def test_a_disturbed_measurement_is_made_again(monkeypatch):
    """Others have had 0, then 50 seconds of the machine during the first measurement, and no more during the second."""
    seconds, calls = iter([0.0, 50.0, 50.0, 50.0]), []
    monkeypatch.setattr(tables, "others_cpu_s", lambda: next(seconds))
    monkeypatch.setattr(tables.time, "sleep", lambda _: None)
    measured = tables.CpuCalls(calls.append, wait_s=60.0)
    assert measured.measure_us(0.0) > 0
    assert (len(calls), measured.others) == (10, 0.0)


def test_a_measurement_that_stays_disturbed_says_so(monkeypatch):
    seconds = iter([0.0, 50.0])
    monkeypatch.setattr(tables, "others_cpu_s", lambda: next(seconds))
    measured = tables.CpuCalls(lambda turn: None, wait_s=0.0)
    assert measured.measure_us(0.0) > 0
    assert measured.others > 0.1
