"""fp8: rounding, calibration, models against the goldens, and exported files in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fp8_models import fp8_model, golden_fp8, run
from golden_cases import GOLDEN, GoldenCase, assert_close, embed
from safetensors.torch import load_file
from torch.nn import functional

from hstu_trt.contract.cli import main
from hstu_trt.contract.fp8_plan import Fp8Plan, fp8_sites, layer_sites
from hstu_trt.contract.model_folder import TAPS, read_model_folder
from hstu_trt.contract.numerics import FP8_BEYOND_LAYERS, compare
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import FUSED, default_limits
from hstu_trt.engines.graphs import prepare
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.export.calibration import calibration_requests, synthetic_requests
from hstu_trt.export.fp8 import E4M3, E4M3_MAX, SMALLEST_SCALE, Fp8Linear, from_e4m3, scale_of, to_e4m3
from hstu_trt.export.onnx_functions import FP8_OVERLOAD
from hstu_trt.export.quantise import parts_of
from hstu_trt.export.torch_runner import TorchRunner
from hstu_trt.export.weights import random_checkpoint

VALUES = torch.tensor([0.0, -0.0, 1.0, 1.06, -3.3, 447.9, 465.0, -1e4, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 240.0])


def test_rounding_is_that_of_ml_dtypes_but_saturates() -> None:
    x = torch.cat([VALUES, torch.linspace(-450, 450, 4001)])
    expected = x.numpy().clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    torch.testing.assert_close(to_e4m3(x, torch.tensor(1.0)).float(), torch.from_numpy(expected), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.0123, SMALLEST_SCALE])
def test_onnx_runtime_rounds_alike(scale: float) -> None:
    """QuantizeLinear and DequantizeLinear of the exported graphs give PyTorch's bits."""
    parts = "x8 = QuantizeLinear (x, s, z) y = DequantizeLinear (x8, s)"
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float16[n] x, float16 s) => (float16[n] y) {{ {parts} }}'
    model = onnx.parser.parse_model(text)
    zero = onnx.helper.make_tensor("z", onnx.TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    model.graph.initializer.append(zero)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    half = torch.tensor(scale, dtype=torch.float16)
    x = (torch.cat([VALUES, torch.randn(4096, generator=torch.Generator().manual_seed(1)) * 99]) * scale).half()
    found = session.run(None, {"x": x.numpy(), "s": half.numpy()})[0]
    np.testing.assert_array_equal(found, from_e4m3(to_e4m3(x, half), half).numpy())


@pytest.mark.parametrize(("largest", "scale"), [(448.0, 1.0), (0.0, SMALLEST_SCALE), (1e9, 65504.0)])
def test_scales_stay_in_the_range_of_fp16(largest: float, scale: float) -> None:
    assert scale_of(torch.tensor(largest)).item() == scale


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "bias"), [(7, 40, 24, True), (1, 1, 16, False), (0, 8, 16, True)]
)
def test_a_product_is_close_to_its_fp32_self(rows: int, inputs: int, outputs: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    weight[0] *= 1000  # a scale per output column: one large column does not coarsen the others
    b = torch.randn(outputs, generator=generator) if bias else None
    stored_by_inputs = weight.t().contiguous().t()
    module = Fp8Linear.of(stored_by_inputs, b, x.abs().max() if rows else torch.tensor(1.0))
    assert module.weight.is_contiguous()
    out, expected = module(x.half()).float(), functional.linear(x, weight, b)
    assert out.shape == expected.shape and module.weight.dtype == E4M3
    for column in range(outputs):
        error = (out[:, column] - expected[:, column]).norm()
        assert error <= 0.09 * (x.norm() * weight[column].norm()) / max(inputs, 1) ** 0.5 + 2e-3


def test_heavy_tailed_weights_have_outliers_and_unit_variance() -> None:
    key = "_hstu_transducer._stu_module._stu_layers.0._uvqk_weight"
    plain, heavy = (random_checkpoint(debug(), 3, heavy_tailed=heavy).dense[key] * 8 for heavy in (False, True))
    assert plain.abs().max() < 6 and heavy.abs().max() > 10
    assert heavy.std() == pytest.approx(1.0, rel=0.25)


def test_every_part_is_found_once(case_a: GoldenCase) -> None:
    model = golden_fp8(case_a, ())
    parts = parts_of(model)
    assert tuple(parts) == fp8_sites(case_a.config)
    names = [part.name for found in parts.values() for part in found]
    assert len(names) == len(set(names)) and all(parts.values())
    assert [part.name for part in parts["head"]] == ["head.0"], "the last product has too few columns"


def test_golden_cases_with_the_layers_in_fp8(golden_case: GoldenCase) -> None:
    model = golden_fp8(golden_case, layer_sites(golden_case.config))
    taps, vectors, scores = run(model, embed(golden_case, "float16"))
    outputs = golden_case.outputs
    for layer, tap in enumerate(taps):
        assert_close(f"stu.{layer}", tap, golden_case.split(outputs[f"tc.stu.{layer}.out"]), "stu", "fp8")
    assert_close("user embeddings", vectors, outputs["tc.out.user_embeddings"], "hstu", "fp8")
    assert_close("preds", scores.T.contiguous(), outputs["tc.out.preds"], "ranking", "fp8")


def test_golden_case_with_everything_in_fp8(case_a: GoldenCase) -> None:
    model = golden_fp8(case_a, fp8_sites(case_a.config))
    _, vectors, scores = run(model, embed(case_a, "float16"))
    assert_close("user embeddings", vectors, case_a.outputs["tc.out.user_embeddings"], "hstu", FP8_BEYOND_LAYERS)
    assert_close("preds", scores.T.contiguous(), case_a.outputs["tc.out.preds"], "ranking", FP8_BEYOND_LAYERS)


def test_a_wrong_scale_is_beyond_the_tolerance(case_a: GoldenCase) -> None:
    model = golden_fp8(case_a, layer_sites(case_a.config))
    tokens = model._hstu_transducer._stu_module.layers[0].quantise_tokens
    tokens.q_scale.data *= 0.05  # queries saturate
    _, vectors, _ = run(model, embed(case_a, "float16"))
    with pytest.raises(AssertionError, match="user embeddings"):
        assert_close("user embeddings", vectors, case_a.outputs["tc.out.user_embeddings"], "hstu", "fp8")


def test_heavy_tails_stay_close_to_fp32() -> None:
    config = debug()
    for heavy in (False, True):
        checkpoint = random_checkpoint(config, 5, heavy_tailed=heavy)
        inputs = _inputs(config, checkpoint)
        _, exact, _ = run(fp8_model(config, checkpoint, ()), inputs)
        _, vectors, _ = run(fp8_model(config, checkpoint, layer_sites(config)), inputs)
        assert (vectors - exact).norm() / exact.norm() < 0.03


def _inputs(config, checkpoint) -> dict[str, torch.Tensor]:  # type: ignore[no-untyped-def]
    from fp8_models import lookup_stage

    packed = synthetic_requests(config, default_limits(config), 6)
    inputs = {name: torch.from_numpy(array) for name, array in packed.items()}
    inputs["attention_norm"] = torch.tensor([float(config.max_seq_len)])
    return inputs | lookup_stage(config, checkpoint, "float16").look_up(inputs)


def score(folder: Path, runner: str, out: Path) -> dict[str, torch.Tensor]:
    inputs = ["--inputs", str(GOLDEN / "caseA/inputs.safetensors"), "--attention-norm", "batch_max", "--taps"]
    assert main(["score", "--model", str(folder), *inputs, "--runner", runner, "--out", str(out)]) == 0
    return load_file(out)


def test_exported_files_against_pytorch_and_the_golden(
    exported: Callable[[str], Path], case_a: GoldenCase, tmp_path: Path
) -> None:
    found = {name: score(exported("fp8"), name, tmp_path / f"{name}.safetensors") for name in ("torch", "onnxruntime")}
    for name, out in found.items():
        assert_close(f"{name} preds", out["preds"], case_a.outputs["tc.out.preds"], "ranking", "fp8")
        golden = case_a.outputs["tc.out.user_embeddings"]
        assert_close(f"{name} users", out["user_embeddings"], golden, "hstu", "fp8")
    # Apart from each other by e4m3 values on the border between two, which an fp16 rounding moves.
    for name, limit in (("preds", 5e-3), ("user_embeddings", 3e-2)):
        report = compare(name, found["torch"][name].numpy(), found["onnxruntime"][name].numpy())
        assert report.max_abs <= limit, report.text()


def test_exported_folder_says_what_is_in_fp8(exported: Callable[[str], Path]) -> None:
    model = read_model_folder(exported("fp8"))
    assert model.fp8_sites == layer_sites(model.config) and model.tolerances == "fp8"
    document = json.loads((model.path / "manifest.json").read_text())
    assert document["calibration"] == {"requests": "synthetic:32", "users": 32, "attention_norm": 128.0}
    weights = load_file(model.weights)
    assert sum(value.dtype == E4M3 for value in weights.values()) == 2 * model.config.layers
    assert not any(key.endswith("_uvqk_weight") for key in weights)


def attention_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "HstuAttention"]


def test_attention_takes_tokens_straight_from_quantize_linear(exported: Callable[[str], Path]) -> None:
    model = onnx.load(read_model_folder(exported("fp8")).onnx("hstu"), load_external_data=False)
    makers = {name: node.op_type for node in model.graph.node for name in node.output}
    nodes = attention_nodes(model.graph)
    assert [[makers[name] for name in node.input[:3]] for node in nodes] == [["QuantizeLinear"] * 3] * len(nodes)
    assert [len(node.input) for node in nodes] == [10] * len(nodes)
    assert {f.name: f.overload for f in model.functions} == {"HstuAttention": ""}
    body = model.functions[0].node
    assert [node.op_type for node in body[:4]] == ["Constant", "Cast", "DequantizeLinear", "Cast"]


@pytest.fixture(scope="module")
def mixed(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp8 model made from the fp16 folder by a plan that keeps the attention of the second layer in fp16."""
    folder = tmp_path_factory.mktemp("mixed")
    sites = ("stu.0.attention", "stu.1.uvqk", "stu.2.attention", "head")
    Fp8Plan(model="ckptA", fp8=sites).save(folder / "plan.json", "test")
    options = ["--plan", str(folder / "plan.json"), "--attention-norm", "batch_max", "--calibration"]
    source = ["--weights", str(exported("fp16")), "--precision", "fp8", "--out", str(folder / "fp8")]
    assert main(["export", *source, *options, str(GOLDEN / "caseA/inputs.safetensors")]) == 0
    return folder / "fp8"


def test_fp8_and_fp16_attention_in_one_model(mixed: Path, case_a: GoldenCase, tmp_path: Path) -> None:
    for stage in ("hstu", FUSED, TAPS):
        model = onnx.load(mixed / f"{stage}.onnx", load_external_data=False)
        assert [node.overload for node in attention_nodes(model.graph)] == [FP8_OVERLOAD, "", FP8_OVERLOAD]
        assert model.ir_version >= 10
        inlined = prepare(model, mixed, plugins=False).model
        assert not attention_nodes(inlined.graph) and not inlined.functions
        inferred = onnx.shape_inference.infer_shapes(inlined, strict_mode=True)
        assert {node.domain for node in inferred.graph.node} <= {"", "ai.onnx"}
        plugins = prepare(model, mixed, plugins=True).model
        assert [node.overload for node in attention_nodes(plugins.graph)] == ["", "", ""]
        assert [len(node.input) for node in attention_nodes(plugins.graph)] == [10, 7, 10]
    found = {name: score(mixed, name, tmp_path / name)["preds"] for name in ("torch", "onnxruntime")}
    for name, preds in found.items():
        assert_close(name, preds, case_a.outputs["tc.out.preds"], "ranking", FP8_BEYOND_LAYERS)
    assert compare("preds", found["torch"].numpy(), found["onnxruntime"].numpy()).max_abs < 1e-2


def test_a_model_folder_brings_config_name_and_limits(mixed: Path, exported: Callable[[str], Path]) -> None:
    source, model = read_model_folder(exported("fp16")), read_model_folder(mixed)
    assert (model.config, model.name, model.limits) == (source.config, source.name, source.limits)


@pytest.mark.parametrize("runner", [TorchRunner, OnnxRuntimeRunner])
def test_stages_open_for_fp8_folders(runner: type, exported: Callable[[str], Path]) -> None:
    model = read_model_folder(exported("fp8"))
    with runner(model, "mlp_head") as opened:
        assert opened.spec.tensor("user_embeddings").dtype == "float16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", "synthetic:0"], "expected a FILE or synthetic:<requests>"),
        (["--calibration", "no.safetensors"], "calibration no.safetensors"),
        (["--plan", "no.json"], "no precision plan at no.json"),
        (["--precision", "fp16", "--plan", "all"], "--plan goes with --precision fp8"),
    ],
)
def test_wrong_options_are_said_in_words(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = ["export", "--config", "debug", "--weights", "random:1", "--precision", "fp8", "--out", str(tmp_path / "m")]
    assert main([*base, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_fp8_folder_is_no_source(exported: Callable[[str], Path], tmp_path: Path, capsys) -> None:
    assert main(["export", "--weights", str(exported("fp8")), "--precision", "fp8", "--out", str(tmp_path / "m")]) == 2
    assert "holds weights in fp8; export from the checkpoint" in capsys.readouterr().err
    assert main(["export", "--weights", "random:1", "--out", str(tmp_path / "m")]) == 2
    assert "--config is missing" in capsys.readouterr().err


@pytest.mark.parametrize("requests", [1, 2, 33])
def test_made_up_requests_span_the_limits(requests: int, case_a: GoldenCase) -> None:
    limits = default_limits(case_a.config)
    packed = synthetic_requests(case_a.config, limits, requests)
    lengths = np.diff(packed["uih_offsets"])
    assert len(lengths) == requests and lengths[0] == 0
    assert requests == 1 or lengths.max() == limits.history
    again = calibration_requests(case_a.config, limits, f"synthetic:{requests}")
    assert all((again[name] == array).all() for name, array in packed.items())
    assert torch.finfo(E4M3).max == E4M3_MAX
