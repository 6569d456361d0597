"""The exported files: names, dims and ops of the contract, self-contained, and equal to the goldens in ONNX Runtime."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from golden_cases import GOLDEN, GoldenCase, load_case
from safetensors.numpy import load_file

from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.model_folder import TAPS, ModelFolder, onnx_stages, read_model_folder
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.ops import OP_DOMAIN, OPS
from hstu_trt.contract.runner import Runner
from hstu_trt.contract.split_users import one_user_feeds
from hstu_trt.contract.tensors import FUSED, Dim, Limits, stage_specs
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.export.build import build_ranking_model
from hstu_trt.export.onnx_export import export_stage
from hstu_trt.export.stages import HstuStage
from hstu_trt.export.tables import checked_rows
from hstu_trt.export.torch_runner import TorchRunner

FILES = ("embedding_lookup", "hstu", "mlp_head", FUSED, TAPS)


@pytest.fixture(scope="module", params=["fp32", "fp16", "fp8"])
def model(request: pytest.FixtureRequest, exported: Callable[[str], Path]) -> ModelFolder:
    return read_model_folder(exported(request.param))


def load(model: ModelFolder, stage: str) -> onnx.ModelProto:
    return onnx.load(model.onnx(stage), load_external_data=False)


def signature(values: list[onnx.ValueInfoProto]) -> dict[str, tuple]:
    return {
        value.name: (
            np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)).name,
            tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
        )
        for value in values
    }


@pytest.mark.parametrize("stage", FILES)
def test_inputs_and_outputs_are_the_contracts(model: ModelFolder, stage: str) -> None:
    graph, spec = load(model, stage).graph, model.specs["hstu" if stage == TAPS else stage]

    def wanted(specs: tuple) -> dict[str, tuple]:
        return {t.name: (t.dtype, tuple(d.name if isinstance(d, Dim) else d for d in t.dims)) for t in specs}

    assert signature(graph.input) == wanted(spec.inputs)
    assert signature(graph.output).items() >= wanted(spec.outputs).items()


@pytest.mark.parametrize("stage", FILES)
def test_custom_nodes_are_the_op_specs(model: ModelFolder, stage: str) -> None:
    proto = load(model, stage)
    nodes = [node for node in proto.graph.node if node.domain == OP_DOMAIN]
    for node in nodes:
        spec = OPS[node.op_type]
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert values.keys() == {a.name for a in spec.attributes if not a.optional} | spec.plugin_attributes.keys()
        assert (values["plugin_version"], values["plugin_namespace"]) == (b"1", b"hstu.trt")
    counts = {name: sum(node.op_type == name for node in nodes) for name in OPS}
    layers, lookups = model.config.layers, len(model.config.uih_features + model.config.candidate_features) + 1
    assert counts == {
        "HstuAttention": 0 if stage in ("embedding_lookup", "mlp_head") else layers,
        "EmbeddingLookup": lookups if stage in ("embedding_lookup", FUSED) else 0,
    }
    assert {f.name for f in proto.functions} == {name for name, count in counts.items() if count}


@pytest.mark.parametrize("stage", FILES)
def test_full_check_and_external_data(model: ModelFolder, stage: str) -> None:
    onnx.checker.check_model(model.onnx(stage), full_check=True)
    for tensor in load(model, stage).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            [location] = [e.value for e in tensor.external_data if e.key == "location"]
            assert location == "weights.safetensors" or location.startswith("tables/")
        else:
            assert len(tensor.raw_data) < 1024, f"{tensor.name} of {len(tensor.raw_data)} bytes stands in the .onnx"


@pytest.mark.parametrize("stage", FILES)
def test_no_line_of_code_is_in_a_file(model: ModelFolder, stage: str) -> None:
    """Or an edit beside the model's code would change its digest."""
    assert b".py" not in model.onnx(stage).read_bytes()


def test_last_layer_queries_candidates_only(model: ModelFolder) -> None:
    graph = load(model, "hstu").graph
    attention = [node for node in graph.node if node.op_type == "HstuAttention"]
    assert [node.input[3] == node.input[4] for node in attention] == [True] * (model.config.layers - 1) + [False]


def test_weights_file_is_a_complete_state_dict(model: ModelFolder) -> None:
    if model.precision == "fp8":
        pytest.skip("tests/export/test_fp8.py looks at these weights")
    keys = {key for key in load_file(model.weights) if key.startswith("_")}
    assert keys == load_case("caseA").checkpoint.dense.keys()


def test_integers_and_time_stay_wide_in_fp16(exported: Callable[[str], Path]) -> None:
    """Square root (time buckets), sine and cosine (time of day) and every norm work on fp32 in the fp16 model."""
    model = read_model_folder(exported("fp16"))
    inferred = onnx.shape_inference.infer_shapes(onnx.load(model.onnx("hstu")))
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.input)}
    sensitive = [n for n in inferred.graph.node if n.op_type in ("Sqrt", "Sin", "Cos", "LayerNormalization")]
    assert len(sensitive) >= 3 + 2 * model.config.layers
    assert {types[node.input[0]] for node in sensitive} == {onnx.TensorProto.FLOAT}
    products = [
        types[n.input[0]] for n in inferred.graph.node if n.op_type in ("Gemm", "MatMul") and n.input[0] in types
    ]
    assert set(products) == {onnx.TensorProto.FLOAT16}


GOLDEN_EXPORTS = ("caseB", "caseB2", "caseB3")


@pytest.fixture(scope="module", params=GOLDEN_EXPORTS)
def golden_export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GoldenCase, Path]:
    folder, out = GOLDEN / request.param, tmp_path_factory.mktemp(request.param) / "fp32"
    weights = ["--config", str(folder / "config.json"), "--weights", str(folder / "state_dict.safetensors")]
    assert main(["export", *weights, "--precision", "fp32", "--out", str(out)]) == 0
    return load_case(request.param), out


def test_other_model_shapes_reproduce_their_goldens(golden_export: tuple[GoldenCase, Path], tmp_path: Path) -> None:
    case, folder = golden_export
    inputs = Path(case.checkpoint.source).with_name("inputs.safetensors")
    arguments = ["--model", str(folder), "--inputs", str(inputs), "--attention-norm", "batch_max", "--taps"]
    assert main(["score", *arguments, "--runner", "onnxruntime", "--out", str(tmp_path / "o.safetensors")]) == 0
    out = load_file(tmp_path / "o.safetensors")
    wanted = {"preds": ("tc.out.preds", "ranking"), "user_embeddings": ("tc.out.user_embeddings", "hstu")}
    wanted |= {f"stu.{n}.out": (f"tc.stu.{n}.out", "stu") for n in range(case.config.layers)}
    assert out.keys() == wanted.keys()
    for name, (golden_name, stage) in wanted.items():
        report = compare(name, out[name], case.outputs[golden_name].numpy())
        assert report.passes(TOLERANCES[stage, "fp32"]), report.text()


@pytest.mark.parametrize("engine", [TorchRunner, OnnxRuntimeRunner])
def test_batch_mates_do_not_change_a_bit(golden_export: tuple[GoldenCase, Path], engine: type[Runner]) -> None:
    case, folder = golden_export
    with engine(read_model_folder(folder), FUSED) as runner:
        inputs = {spec.name: spec for spec in runner.spec.inputs}
        feed = {n: case.request[n].reshape(-1) if len(s.dims) == 1 else case.request[n] for n, s in inputs.items()}
        together = runner.infer(feed)["preds"]
        alone = [runner.infer(one)["preds"] for one in one_user_feeds(feed)]
    np.testing.assert_array_equal(np.concatenate(alone), together)


def export(*arguments: str) -> int:
    return main(
        ["export", "--config", str(GOLDEN / "caseA/config.json"), "--weights", str(GOLDEN / "ckptA"), *arguments]
    )


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert export("--out", str(tmp_path / "m"), "--dry-run") == 0
    text = capsys.readouterr().out
    assert "table item_id: 400 x 32 float16 <- item_id, item_candidate_id" in text
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "manifest.json").write_text('{"schema": 1, "kind": "thesis", "files": {}}')
    assert export("--out", str(tmp_path)) == 2
    assert export("--out", str(tmp_path / "thesis.txt")) == 2
    assert "no model folder of ours" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_unknown_config_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["export", "--config", "no.json", "--weights", "random:1", "--out", str(tmp_path / "m")]) == 2
    assert "no such file, and not a preset (debug, dlrm_v3)" in capsys.readouterr().err


def test_a_config_that_does_not_fit_is_said_in_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    document = json.loads((GOLDEN / "caseA/config.json").read_text()) | {"hstu_attn_num_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(document))
    arguments = ["--config", str(tmp_path / "config.json"), "--weights", str(GOLDEN / "ckptA")]
    assert main(["export", *arguments, "--out", str(tmp_path / "m")]) == 2
    assert "7 keys missing (-), 0 unexpected (+)" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_every_stage_has_a_file(model: ModelFolder) -> None:
    assert {p.stem for p in model.path.glob("*.onnx")} == {*onnx_stages(model.config), TAPS}


def test_the_smallest_limits_are_enough_for_tracing(case_a: GoldenCase) -> None:
    limits = Limits(users=1, history=1, candidates=1, batch_history=1, batch_candidates=1)
    model = build_ranking_model(case_a.config, case_a.checkpoint.dense, "golden", "fp32")
    spec = stage_specs(case_a.config, limits, "fp32")["hstu"]
    assert export_stage(HstuStage(spec, model)).graph.node
    with pytest.raises(ConfigError, match="limit users must be >= 1"):
        dataclasses.replace(limits, users=0)


def test_tables_beyond_the_disk_are_refused_before_writing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = ["--table-rows", f"item_id={10**15}"]
    assert main(["export", "--config", "debug", "--weights", "random:1", *rows, "--out", str(tmp_path / "m")]) == 2
    assert "the tables need" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["item_id", "item_id=", "item_id=0", "nothing=5", "item_id=-1"])
def test_malformed_table_rows(option: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--config", "debug", "--weights", "random:1", "--out", str(tmp_path / "m")]
    assert main(["export", *arguments, "--table-rows", option]) == 2
    assert "expected TABLE=ROWS" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "precision"), [(np.nan, "fp32"), (np.inf, "fp32"), (70_000.0, "fp16")])
def test_table_values_beyond_the_precision_are_named(value: float, precision: str) -> None:
    table = TableConfig(name="item_id", rows=4, dim=2, dtype="float32", features=("item_id",))
    rows = np.zeros((2, 2), dtype=np.float32)
    rows[1, 0] = value
    blocks = checked_rows([np.zeros((2, 2), dtype=np.float32), rows], table, precision)
    with pytest.raises(ArtefactError, match=rf"item_id holds .* at \[3, 0\], outside {precision}"):
        list(blocks)
