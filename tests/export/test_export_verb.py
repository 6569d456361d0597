"""``hstu-trt export`` on wrong input: one clear line, exit code 2 (130 on Ctrl-C), and nothing half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden_cases import GOLDEN, readme
from safetensors import SafetensorError

from hstu_trt.contract.cli import main
from hstu_trt.export import export_model

CONFIG, WEIGHTS = GOLDEN / "caseA/config.json", GOLDEN / "ckptA"


@pytest.fixture
def export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """``export("--precision", "fp8")``: the exit code, and the error without notes of progress."""

    def run(*more: object, config: object = CONFIG, weights: object = WEIGHTS) -> tuple[int, str]:
        options = ["--weights", weights, "--out", tmp_path / "out", *more]
        code = main(["export", *(["--config", str(config)] if config else []), *map(str, options)])
        lines = capsys.readouterr().err.splitlines()
        return code, "\n".join(line for line in lines if not line.startswith("["))

    return run


def config_with(folder: Path, **keys: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**json.loads(CONFIG.read_text()), **keys}))
    return folder / "config.json"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("random:x", [], "weights random:x: expected random:SEED with a whole number"),
        ("random:\u00b2", [], "weights random:\u00b2: expected random:SEED with a whole number"),
        ("random:" + "9" * 30, [], "expected random:SEED with a whole number of at most 18 digits"),
        ("random:1", ["--table-rows", "item_id=\u00b2"], "--table-rows item_id=\u00b2: expected TABLE=ROWS"),
        ("random:1", ["--calibration", "synthetic:2"], "--calibration goes with --precision fp8"),
        (
            "random:1",
            ["--precision", "fp8", "--calibration", "synthetic:\u00b2", "--table-rows", "item_id=5"],
            "calibration synthetic:\u00b2: expected a FILE or synthetic:<requests>",
        ),
        ("random:1", ["--max-history", "9" * 20], "limit history must fit INT32, as offsets do"),
    ],
)
def test_wrong_options_are_refused_in_a_line(
    export: Callable[..., tuple[int, str]], tmp_path: Path, source: str, options: list[str], message: str
) -> None:
    code, error = export(*options, config="debug", weights=source)
    assert code == 2
    assert error.startswith("hstu-trt export: error: ") and message in error and "\n" not in error
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_weights_of_another_shape_are_refused_before_anything_is_written(
    export: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry: list[str]
) -> None:
    monkeypatch.setattr(export_model, "write_tables", None)
    code, error = export(*dry, config=config_with(tmp_path, hstu_num_heads=4))
    assert code == 2
    assert "15 tensors do not have the config's shape" in error
    assert os.listdir(tmp_path) == ["config.json"]


def test_a_sequence_encoder_is_exported_in_fp32_alone(export: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Its stage computes in fp32 whatever the manifest would say."""
    (tmp_path / "config.json").write_text(json.dumps(readme("caseE_research")["cases"]["e0"]))
    for precision in ("fp16", "fp8"):
        code, error = export("--precision", precision, config=tmp_path / "config.json")
        assert code == 2
        assert f"{precision} is there for ranking models only; export a sequence encoder in fp32" in error


def stop(error: BaseException) -> Callable[..., Any]:
    def raise_it(*_: object, **__: object) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "hstu-trt export: interrupted"),
    ],
)
def test_what_stops_an_export_leaves_the_model_before(
    export: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    said: str,
) -> None:
    """A full disk, and Ctrl-C, when the weights are written: the last thing but the graphs."""
    (tmp_path / "out").mkdir()
    before = {"schema": 1, "kind": "onnx"}
    (tmp_path / "out/manifest.json").write_text(json.dumps(before))
    monkeypatch.setattr("safetensors.torch.save_file", stop(error))
    monkeypatch.setattr(export_model, "_traced", lambda *_: {})
    found, line = export()
    assert (found, said in line) == (code, True), line
    assert json.loads((tmp_path / "out/manifest.json").read_text()) == before
    assert os.listdir(tmp_path) == ["out"]
