"""The torch runner on a CUDA GPU: our kernels and the fp8 tensor cores, held against fp32 on the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_models import fp8_model, golden_fp8, lookup_stage, run
from golden_cases import GOLDEN, GoldenCase, assert_close, embed, load_case
from torch import Tensor

from hstu_trt.bench import chain
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.fp8_plan import fp8_sites, layer_sites
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import default_limits
from hstu_trt.export.build import build_ranking_model
from hstu_trt.export.calibration import synthetic_requests
from hstu_trt.export.fp8 import E4M3, Fp8Linear
from hstu_trt.export.weights import random_checkpoint

# Head dims and widths that the sm90 kernel and the fp8 tensor cores take.
WIDE = dataclasses.replace(debug(), qk_dim=64, v_dim=64, model_dim=128, preprocessor_dim=64, max_seq_len=1024)

# Precision, its parts in fp8, and the relative L2 error of user embeddings and the largest of the scores.
LIMITS = [("fp32", "", 2e-5), ("fp16", "", 2e-3), ("fp8", "layers", 1e-2), ("fp8", "all", 0.15)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of q in the calls of our attention kernels, which the torch op runs on from here on."""
    if not chain.use_kernels():
        pytest.skip("the kernels are not built: make plugins")
    from hstu_trt.plugins import attention as kernels

    seen: list[torch.dtype] = []
    launch = kernels.attention

    def spy(call: Any, **options: Any) -> Tensor:
        seen.append(call.q.dtype)
        return launch(call, **options)

    monkeypatch.setattr(kernels, "attention", spy)
    return seen


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Weight shapes of the products on fp8 tensor cores."""
    seen: list[tuple[int, ...]] = []
    multiply = torch._scaled_mm

    def spy(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        seen.append(tuple(b.shape))
        return multiply(a, b, **options)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 16), (33, 512, 2048), (130, 1536, 512), (0, 64, 64)])
@torch.inference_mode()
def test_products_on_tensor_cores(
    products: list[tuple[int, ...]], rows: int, inputs: int, outputs: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(outputs + rows)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    b = torch.randn(outputs, generator=generator) if bias else None
    module = Fp8Linear.of(weight * inputs**-0.5, b, torch.tensor(4.0))
    expected = module(x.half()).float()
    found = module.cuda()(x.half().cuda()).float().cpu()
    assert products == [(inputs, outputs)]
    assert found.shape == expected.shape
    # The same e4m3 values: what differs is the accumulation on the tensor cores, and one rounding.
    assert (found - expected).norm() <= 3e-3 * expected.norm()


@pytest.mark.gpu
@torch.inference_mode()
def test_other_shapes_are_multiplied_in_fp16(products: list[tuple[int, ...]]) -> None:
    module = Fp8Linear.of(torch.randn(24, 40), None, torch.tensor(4.0))
    x = torch.randn(9, 40).half()
    expected = module(x).float()
    found = module.cuda()(x.cuda()).float().cpu()
    assert products == [] and (found - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["caseA", "caseB", "caseB2", "caseB3"])
def test_golden_cases_with_the_layers_in_fp8(calls: list[torch.dtype], name: str) -> None:
    case = load_case(name)
    model = golden_fp8(case, layer_sites(case.config)).cuda()
    taps, vectors, scores = run(model, {key: tensor.cuda() for key, tensor in embed(case, "float16").items()})
    assert calls == [E4M3] * (2 * case.config.layers)
    for layer, tap in enumerate(taps):
        assert_close(f"stu.{layer}", tap, case.split(case.outputs[f"tc.stu.{layer}.out"]), "stu", "fp8")
    assert_close("user embeddings", vectors, case.outputs["tc.out.user_embeddings"], "hstu", "fp8")
    assert_close("preds", scores.T.contiguous(), case.outputs["tc.out.preds"], "ranking", "fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("heavy", [False, True], ids=["gaussian", "heavy-tailed"])
@pytest.mark.parametrize(
    ("precision", "parts", "limit"),
    [("fp32", "", 2e-5), ("fp16", "", 2e-3), ("fp8", "layers", 1e-2), ("fp8", "all", 0.15)],
)
def test_wide_models_against_fp32_on_the_cpu(
    calls: list[torch.dtype], products: list[tuple[int, ...]], precision: str, parts: str, limit: float, heavy: bool
) -> None:
    checkpoint = random_checkpoint(WIDE, 7, heavy_tailed=heavy)
    packed = synthetic_requests(WIDE, default_limits(WIDE), 6)
    feed = {name: torch.from_numpy(array) for name, array in packed.items()}
    feed["attention_norm"] = torch.tensor([float(WIDE.max_seq_len)])
    rows = {dtype: lookup_stage(WIDE, checkpoint, dtype).look_up(feed) for dtype in ("float32", "float16")}
    exact = run(build_ranking_model(WIDE, checkpoint.dense, "test", "fp32"), feed | rows["float32"])
    if precision == "fp8":
        sites = layer_sites(WIDE) if parts == "layers" else fp8_sites(WIDE)
        model = fp8_model(WIDE, checkpoint, sites)
    else:
        model = build_ranking_model(WIDE, checkpoint.dense, "test", precision)  # type: ignore[arg-type]
    inputs = feed | rows["float32" if precision == "fp32" else "float16"]
    _, vectors, scores = run(model.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()})
    assert len(calls) == 2 * WIDE.layers
    assert set(calls) == {{"fp32": torch.float32, "fp16": torch.float16, "fp8": E4M3}[precision]}
    assert bool(products) == (precision == "fp8")
    assert (vectors - exact[1]).norm() <= limit * exact[1].norm()
    assert (scores - exact[2]).abs().max() <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
def test_score_runs_on_our_kernels(
    calls: list[torch.dtype], precision: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    case: GoldenCase = load_case("caseA")
    inputs = ["--inputs", str(GOLDEN / "caseA/inputs.safetensors"), "--attention-norm", "batch_max"]
    where = ["--runner", "torch", "--device", "cuda", "--out", str(tmp_path / "o.safetensors")]
    assert main(["score", "--model", str(exported(precision)), *inputs, *where]) == 0
    assert len(calls) == case.config.layers
    scored = load_file(tmp_path / "o.safetensors")
    assert_close("preds", scored["preds"], case.outputs["tc.out.preds"], "ranking", precision)


def test_missing_kernels_are_said_in_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from hstu_trt.plugins import library

    def missing() -> None:
        raise ArtefactError("build/lib/x.so is not there: build the kernels with `make plugins`")

    monkeypatch.setattr(library, "load_library", missing)
    assert chain.use_kernels.__wrapped__() is False
    assert "note: attention runs in plain PyTorch, not on our kernels: build/lib/x.so" in capsys.readouterr().err
