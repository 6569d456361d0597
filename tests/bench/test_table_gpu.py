"""The GPU lookup benchmark without a GPU: what it counts, and what it refuses."""

import pytest

from hstu_trt.bench.result_rows import ResultRow
from hstu_trt.bench.tables import gpu as table_gpu
from hstu_trt.bench.tables.gpu_data import GatherCase
from hstu_trt.contract.cli import main as command_line


def test_the_bytes_of_a_request():
    case = GatherCase(dtype="int8", dim=512, lookups=9048, table_bytes=4 << 30)
    assert (case.rows, case.name) == (8388608, "int8 9048 of 8388608 x 512")
    assert case.moved_bytes == 9048 * (512 + 4 + 8 + 1024)
    half = GatherCase(dtype="fp16", dim=128, lookups=9048, table_bytes=4 << 30)
    assert (half.rows, half.moved_bytes) == (16777216, 9048 * (256 + 8 + 256))


def row(variant, gbps):
    facts = {"device": "x", "date": "x", "commit": "x", "versions": {}, "suite": "x", "case": "x"}
    return ResultRow(**facts, variant=variant, median_us=1.0, spread=0.0, gbps=gbps)


def test_ours_is_held_against_the_better_copy():
    rows = [row(table_gpu.OURS, 90.0), row(table_gpu.MEMCPY, 100.0), row(table_gpu.COPY_KERNEL, 60.0)]
    assert table_gpu._with_copy_share(rows[0], rows).checks["share_of_copy"] == pytest.approx(0.9)
    assert table_gpu._with_copy_share(rows[1], rows) is rows[1]


@pytest.mark.parametrize(
    ("options", "said"), [(["--parts", "gather,all"], "unknown parts all: choose from"), ([], "no CUDA GPU")]
)
def test_what_cannot_be_measured_is_said(monkeypatch, capsys, options, said):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert command_line(["bench", "tables-gpu", *options]) == 2
    assert said in capsys.readouterr().err
