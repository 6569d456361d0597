"""``hstu-trt diff`` and the safetensors files it reads."""

import json
from pathlib import Path

import numpy as np
import pytest

from hstu_trt.bench.files import read_tensors, write_features, write_tensors
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Jagged, jagged_features

BASE = {"preds": np.array([[0.1, 0.2, 0.3]], dtype=np.float32), "empty": np.zeros((0, 4), dtype=np.float32)}
# what B holds beside or instead of A's tensors -> exit code with --atol 1e-3, and what the line says
CASES = {
    "same": ({}, 0, "2 of 2 tensors"),
    "within": ({"preds": BASE["preds"] + np.float32(9e-4)}, 0, "max |difference| 0.0009"),
    "beyond": ({"preds": BASE["preds"] + np.float32([0, 2e-3, 0])}, 1, "at [0, 1]"),
    "shape": ({"preds": BASE["preds"].T}, 1, "shape [1, 3] in A, [3, 1] in B"),
    "extra": ({"more": np.zeros(1)}, 1, "more: only in B"),
    "nan": ({"preds": np.array([[0.1, np.nan, 0.3]], dtype=np.float32)}, 1, "1 elements are NaN"),
    "other dtype": ({"preds": BASE["preds"].astype(np.float16)}, 0, "preds"),
}


def run(tmp_path: Path, b: dict[str, np.ndarray], *options: str) -> int:
    write_tensors(tmp_path / "a.safetensors", BASE)
    write_tensors(tmp_path / "b.safetensors", b)
    return main(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), *options])


@pytest.mark.parametrize("name", CASES)
def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    changes, code, text = CASES[name]
    assert run(tmp_path, BASE | changes, "--atol", "1e-3") == code
    assert text in capsys.readouterr().out


def test_missing_tensor_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, {"preds": BASE["preds"]}, "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    assert {t["name"]: t.get("problem") for t in report["tensors"]} == {"empty": "only in A", "preds": None}


def test_default_is_equality(tmp_path: Path) -> None:
    assert run(tmp_path, BASE) == 0
    assert run(tmp_path, BASE | {"preds": np.nextafter(BASE["preds"], np.float32(1))}) == 1


def test_unreadable_files_and_tolerances(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").write_text("{}")
    for a, options, text in (("none", [], "cannot read"), ("bad", [], "not a safetensors file")):
        assert main(["diff", str(tmp_path / a), str(tmp_path / a), *options]) == 2
        assert text in capsys.readouterr().err
    assert run(tmp_path, BASE, "--atol", "nan") == 2
    assert "--atol" in capsys.readouterr().err


def test_bfloat16_is_read_as_float32(golden: Path) -> None:
    preds = read_tensors(golden / "caseA" / "outputs.safetensors")["out_bf16.preds"]
    assert preds.dtype == np.float32
    assert 0.1 < preds.min() < preds.max() < 0.9


def test_features_go_out_and_come_back(tmp_path: Path) -> None:
    uih = {"item.id": Jagged.of_lists("item.id", [[1, 2], []])}
    write_features(tmp_path / "in.safetensors", uih, {"c": Jagged.of_lists("c", [[], [3]])})
    tensors = read_tensors(tmp_path / "in.safetensors") | {"uih.values": np.zeros(9), "uih.lengths": np.zeros(3)}
    back = jagged_features(tensors, "uih")
    assert list(back) == ["item.id"]
    assert back["item.id"].values.tolist() == [1, 2] and back["item.id"].lengths.tolist() == [2, 0]
    assert jagged_features(tensors, "cand")["c"].lengths.tolist() == [0, 1]


def test_half_a_feature_is_refused() -> None:
    with pytest.raises(InputError, match=r"'uih.x.lengths' is missing beside 'uih.x.values'"):
        jagged_features({"uih.x.values": np.zeros(1, dtype=np.int64)}, "uih")
    with pytest.raises(InputError, match=r"uih.x.*lengths sum to 2"):
        jagged_features({"uih.x.values": np.zeros(1, dtype=np.int64), "uih.x.lengths": np.array([2])}, "uih")
