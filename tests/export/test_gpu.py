"""The PyTorch model on a GPU, with plain PyTorch operators, against the reference's goldens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden_cases import GOLDEN, GoldenCase, assert_close, embed
from safetensors.torch import load_file
from torch import Tensor

from hstu_trt.contract.cli import main
from hstu_trt.export.build import build_ranking_model


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@torch.inference_mode()
def test_golden_cases(golden_case: GoldenCase, precision: str) -> None:
    model = build_ranking_model(golden_case.config, golden_case.checkpoint.dense, "golden", precision).cuda()
    rows = embed(golden_case, {"fp32": "float32", "fp16": "float16"}[precision])
    inputs = {name: tensor.cuda() for name, tensor in rows.items()}
    taps: list[Tensor] = []
    vectors = model.hstu_stage(inputs, taps)
    scores = model.head_stage({**inputs, "user_embeddings": model.hstu_stage(inputs)})
    outputs = golden_case.outputs
    assert_close("user embeddings", vectors.float().cpu(), outputs["tc.out.user_embeddings"], "hstu", precision)
    assert_close("preds", scores.T.cpu().contiguous(), outputs["tc.out.preds"], "ranking", precision)
    for layer, tap in enumerate(taps):
        expected = golden_case.split(outputs[f"tc.stu.{layer}.out"])
        assert_close(f"stu.{layer}", tap.float().cpu(), expected, "stu", precision)


@pytest.mark.gpu
def test_score_on_the_gpu(exported: Callable[[str], Path], tmp_path: Path) -> None:
    inputs = ["--inputs", str(GOLDEN / "caseA/inputs.safetensors"), "--attention-norm", "batch_max"]
    where = ["--runner", "torch", "--device", "cuda", "--out", str(tmp_path / "o.safetensors")]
    assert main(["score", "--model", str(exported("fp32")), *inputs, *where]) == 0
    expected = load_file(GOLDEN / "caseA/outputs.safetensors")["tc.out.preds"]
    assert_close("preds", load_file(tmp_path / "o.safetensors")["preds"], expected, "ranking")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_no_gpu_is_said_in_words(
    exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    inputs = ["--inputs", str(GOLDEN / "caseA/inputs.safetensors"), "--out", str(tmp_path / "o.safetensors")]
    arguments = ["score", "--model", str(exported("fp32")), *inputs, "--device", "cuda"]
    assert main([*arguments, "--runner", "torch"]) == 2
    assert "PyTorch sees no CUDA GPU here" in capsys.readouterr().err
    assert main([*arguments, "--runner", "onnxruntime"]) == 2
    assert "runs on the CPU only" in capsys.readouterr().err
