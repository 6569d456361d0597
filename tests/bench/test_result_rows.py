"""Rows of measurements: their schema, their file, and which is the newest."""

import dataclasses
import json
from pathlib import Path

import pytest

from hstu_trt.bench.result_rows import (
    RESULTS,
    Provenance,
    ResultRow,
    append_rows,
    device_slug,
    git_commit,
    latest,
    package_versions,
    read_rows,
)
from hstu_trt.contract.errors import ArtefactError

ROW = ResultRow(
    suite="kernels",
    case="B4 4x128",
    variant="fp16",
    device="NVIDIA H100 80GB HBM3",
    date="2026-11-22T10:00:00Z",
    commit="abc",
    versions={"torch": "2.11.0"},
    median_us=520.0,
    spread=0.01,
    tflops=636.0,
    ratio_to={"torch eager fp16": 23.0},
    checks={"relative_l2": 2.9e-4},
)
SCHEMA = [
    "suite", "case", "variant", "device", "date", "commit", "versions", "median_us", "spread", "tflops", "gbps",
    "per_s", "ratio_to", "checks",
]  # fmt: skip


def test_rows_have_exactly_the_fields_of_the_design(tmp_path: Path) -> None:
    path = tmp_path / "results" / "kernels_h100.jsonl"
    append_rows(path, [ROW])
    append_rows(path, [dataclasses.replace(ROW, variant="bf16")])
    lines = path.read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [SCHEMA, SCHEMA]
    assert read_rows([path]) == [ROW, dataclasses.replace(ROW, variant="bf16")]


def test_a_nan_is_no_figure() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(ROW, spread=float("nan")).to_json()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        (json.dumps({"suite": "kernels"}), "fields missing"),
        (ROW.to_json()[:-1] + ', "extra": 1}', r"fields unknown \['extra'\]"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{ROW.to_json()}\n{line}\n")
    with pytest.raises(ArtefactError, match=f"rows.jsonl:2.*{said}"):
        read_rows([path])


def test_no_part_of_refused_rows_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [ROW])
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_rows(path, [ROW, dataclasses.replace(ROW, median_us=float("nan"))])
    assert read_rows([path]) == [ROW]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cannot read .*none\.jsonl"):
        read_rows([tmp_path / "none.jsonl"])


def test_the_newest_row_counts() -> None:
    older = dataclasses.replace(ROW, date="2026-11-21T10:00:00Z")
    again = dataclasses.replace(ROW, median_us=1.0)
    assert latest([ROW, older]) == {("B4 4x128", "fp16"): ROW}
    assert latest([ROW, again, older]) == {("B4 4x128", "fp16"): again}


def test_provenance() -> None:
    here = Provenance.here("GPU", {"torch": "1"}, "abc")
    assert here.commit == "abc" and here.date.endswith("Z") and len(here.date) == 20
    assert git_commit()
    assert set(package_versions(["numpy", "no-such-package"])) == {"python", "numpy"}


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx_4090"),
        ("NVIDIA L20", "l20"),
    ],
)
def test_files_are_named_by_the_gpu(device: str, slug: str) -> None:
    assert device_slug(device) == slug


def test_committed_rows_are_whole() -> None:
    read_rows(sorted(RESULTS.glob("*.jsonl")))
