"""The research family against golden caseE: in PyTorch, and exported, in ONNX Runtime."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from golden_cases import GOLDEN, readme
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from hstu_trt.contract.cli import main
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.runner import Runner
from hstu_trt.contract.tensors import RESEARCH_STAGE
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.export.torch_runner import TorchRunner

TENSORS = load_file(GOLDEN / "caseE_research" / "tensors.safetensors")
CASES = readme("caseE_research")["cases"]


@dataclass(frozen=True)
class Exported:
    model: ModelFolder
    feed: dict[str, NDArray]
    encoded: NDArray
    current: NDArray


def pack(name: str) -> tuple[dict[str, NDArray], NDArray]:
    """The golden's padded batch as packed tokens; also the mask of real tokens [B, N]."""
    lengths, times = TENSORS[f"{name}.past_lengths"], TENSORS[f"{name}.timestamps"]
    real = np.arange(times.shape[1]) < lengths[:, None]
    # The bias of the last token is indexed with the query time, which stands right behind the history.
    following = np.concatenate([times[:, 1:], times[:, -1:]], axis=1)
    feed = {
        "uih_ids": TENSORS[f"{name}.past_ids"][real],
        "uih_timestamps": times[real],
        "next_timestamps": following[real],
        "uih_offsets": np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
    }
    return feed, real


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    name, folder = request.param, tmp_path_factory.mktemp("research")
    (folder / "config.json").write_text(json.dumps(CASES[name]))
    prefix = f"{name}.sd."
    save_file(
        {k.removeprefix(prefix): v for k, v in TENSORS.items() if k.startswith(prefix)}, folder / "sd.safetensors"
    )
    arguments = ["--config", str(folder / "config.json"), "--weights", str(folder / "sd.safetensors")]
    assert main(["export", *arguments, "--out", str(folder / "model")]) == 0
    feed, real = pack(name)
    model = read_model_folder(folder / "model")
    return Exported(model, feed, TENSORS[f"{name}.encoded"][real], TENSORS[f"{name}.current"])


@pytest.mark.parametrize("engine", [TorchRunner, OnnxRuntimeRunner])
def test_golden(exported: Exported, engine: type[Runner]) -> None:
    with engine(exported.model, RESEARCH_STAGE) as runner:
        out = runner.infer(exported.feed)
    for name, expected in (("encoded", exported.encoded), ("user_embeddings", exported.current)):
        report = compare(name, out[name], expected)
        assert report.passes(TOLERANCES["research", "fp32"]), report.text()


def test_histories_beyond_the_position_table_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CASES["e0"]))
    prefix = "e0.sd."
    state = {k.removeprefix(prefix): v for k, v in TENSORS.items() if k.startswith(prefix)}
    save_file(state, tmp_path / "sd.safetensors")
    arguments = ["--config", str(tmp_path / "config.json"), "--weights", str(tmp_path / "sd.safetensors")]
    assert main(["export", *arguments, "--max-history", "26", "--out", str(tmp_path / "m"), "--dry-run"]) == 2
    assert "--max-history 26: the position table ends at 25 events" in capsys.readouterr().err


def test_the_bias_matters(exported: Exported) -> None:
    """Other timestamps give other vectors, so the golden does judge the bias."""
    with OnnxRuntimeRunner(exported.model, RESEARCH_STAGE) as runner:
        moved = runner.infer({**exported.feed, "uih_timestamps": exported.feed["uih_timestamps"] // 7})
    assert np.abs(moved["encoded"] - exported.encoded).max() > 1e-3


def test_time_differences_beyond_32_bits(exported: Exported) -> None:
    """ONNX Runtime's Max of INT64 takes 2^31 to 2^32 for negative on x86-64; milliseconds of a month lie there."""
    times = {name: exported.feed[name] * 100_003 for name in ("uih_timestamps", "next_timestamps")}
    assert max(t.max() for t in times.values()) - times["uih_timestamps"].min() > 2**33
    outputs = []
    for engine in (TorchRunner, OnnxRuntimeRunner):
        with engine(exported.model, RESEARCH_STAGE) as runner:
            outputs.append(runner.infer({**exported.feed, **times})["encoded"])
    report = compare("encoded", outputs[1], outputs[0])
    assert report.passes(TOLERANCES["research", "fp32"]), report.text()


def test_the_same_op_with_its_optional_inputs(exported: Exported) -> None:
    graph = onnx.load(exported.model.path / f"{RESEARCH_STAGE}.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "HstuAttention"]
    assert len(nodes) == exported.model.config.layers
    assert all(len(node.input) == 15 and not any(node.input[7:11]) and all(node.input[11:]) for node in nodes)


def test_ranking_verbs_refuse_it(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inputs = str(GOLDEN / "caseA" / "inputs.safetensors")
    out = ["--out", str(tmp_path / "o.safetensors")]
    assert main(["score", "--model", str(exported.model.path), "--inputs", inputs, *out]) == 2
    assert "sequence encoder" in capsys.readouterr().err
