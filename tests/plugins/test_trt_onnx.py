"""The ONNX parser finds the plugins from the exported models. TensorRT-RTX has the parser of TensorRT 11, and needs no
GPU; it takes no plugins, and so ends its process behind the line that is looked for."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PARSE = """
import sys
import tensorrt_rtx as trt
from hstu_trt.plugins.trt_library import load_plugins
load_plugins(trt.get_plugin_registry())
logger = trt.Logger(trt.Logger.VERBOSE)
network = trt.Builder(logger).create_network(0)
trt.OnnxParser(network, logger).parse_from_file(sys.argv[1])
"""

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="TensorRT-RTX is not installed")


def parse(model: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PARSE, str(model)], capture_output=True, text=True, check=False, timeout=120
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("model", "op"), [("hstu", "HstuAttention"), ("embedding_lookup", "EmbeddingLookup")])
def test_the_parser_creates_the_plugin(
    plugins: Path, exported: Callable[[str], Path], precision: str, model: str, op: str
) -> None:
    said = parse(exported(precision) / f"{model}.onnx")
    assert f"Searching for plugin: {op}, plugin_version: 1, plugin_namespace: hstu.trt" in said
    assert f"Successfully created plugin: {op}" in said
    assert "error: " not in said


def test_empty_optional_inputs_keep_their_places(plugins: Path, tmp_path: Path) -> None:
    """The parser passes a null tensor for each, so that attn_scale stays input 10."""
    import onnx
    from onnx import TensorProto, helper

    from hstu_trt.contract.ops import HSTU_ATTENTION

    names = [port.name for port in HSTU_ATTENTION.inputs[:11]]
    types = [TensorProto.FLOAT16] * 3 + [TensorProto.INT32] * 3 + [TensorProto.FLOAT] * 5
    shapes = [[8, 2, 32]] * 3 + [[3]] * 3 + [[1]] * 5
    given = [name if not name.endswith(("q_scale", "k_scale", "v_scale")) else "" for name in names]
    values = [
        helper.make_tensor_value_info(*one) for one in zip(names, types, shapes, strict=True) if one[0] in given
    ]  # fmt: skip
    node = helper.make_node(
        "HstuAttention", given, ["out"], domain="hstu.trt", output_type=10, **HSTU_ATTENTION.plugin_attributes
    )  # fmt: skip
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT16, [8, 2, 32])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("hstu.trt", 1)]
    graph = helper.make_graph([node], "g", values, [out])
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "m.onnx")
    said = parse(tmp_path / "m.onnx")
    assert said.count("Found unset input for HstuAttention") == 3
    assert "Successfully created plugin: HstuAttention" in said
