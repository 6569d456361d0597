"""What becomes of an exported graph before it is parsed: with plugins, and without."""

import numpy as np
import onnx
import onnxruntime
import pytest
from fp8_graph import fp8_graph

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.ops import OP_DOMAIN
from hstu_trt.engines.graphs import prepare, read_graph, table_bytes

NODES = {"embedding_lookup": 5, "hstu": 3, "mlp_head": 0, "ranking_fused": 8}
LOOKUPS = {"embedding_lookup": 5, "hstu": 0, "mlp_head": 0, "ranking_fused": 5}


@pytest.fixture(scope="module")
def golden_model(exported):
    return read_model_folder(exported("fp16"), verify=False)


@pytest.mark.parametrize("stage", NODES)
def test_with_plugins_only_the_nodes_stay(golden_model, stage):
    source = read_graph(golden_model, stage)
    before = source.SerializeToString()
    graph = prepare(source, golden_model.onnx(stage), plugins=True)
    assert not graph.model.functions
    assert source.SerializeToString() == before
    assert (graph.op_nodes, graph.plugin_layers, graph.lookups) == (NODES[stage], NODES[stage], LOOKUPS[stage])
    assert not graph.has_dense_attention
    assert sum(node.domain == OP_DOMAIN for node in graph.model.graph.node) == NODES[stage]


def test_a_plan_holds_no_table(golden_model):
    """The plugin finds a table by its name; weights of the model stay where they are."""
    source = read_graph(golden_model, "ranking_fused")
    assert table_bytes(source) > 0
    graph = prepare(source, golden_model.onnx("ranking_fused"), plugins=True).model
    assert not [t.name for t in graph.graph.initializer if t.name.startswith("tables.")]
    lookups = [node for node in graph.graph.node if node.op_type == "EmbeddingLookup"]
    named = [a.s.decode() for node in lookups for a in node.attribute if a.name == "table_name"]
    assert [len(node.input) for node in lookups] == [1] * 5
    assert set(named) == {table.name for table in golden_model.ranking_config.tables}
    outside = [t for t in graph.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert outside
    assert not [t.name for t in outside if any(e.value.startswith("tables") for e in t.external_data)]


@pytest.mark.parametrize("stage", NODES)
def test_without_plugins_nothing_of_ours_is_left(golden_model, stage):
    graph = prepare(read_graph(golden_model, stage), golden_model.onnx(stage), plugins=False)
    names = [node.name for node in graph.model.graph.node]
    assert len(set(names)) == len(names)
    assert not graph.model.functions
    assert {node.domain for node in graph.model.graph.node} <= {"", "ai.onnx"}
    assert graph.plugin_layers == 0
    assert graph.has_dense_attention == (stage in ("hstu", "ranking_fused"))


def test_the_inlined_fp8_graph_computes_the_same():
    source = fp8_graph()
    inlined = prepare(source, None, plugins=False).model
    feed = {"x": np.linspace(-1, 1, 5 * 64, dtype=np.float16).reshape(5, 64), "norm": np.full(1, 5, np.float32)}
    feed |= {name: np.asarray([0, 5], np.int32) for name in ("query_offsets", "prefix_offsets", "candidate_offsets")}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    one, other = (
        onnxruntime.InferenceSession(m.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)
        for m in (source, inlined)
    )
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[0]).max() > 0


def test_damaged_and_missing_files_name_the_remedy(model):
    model.onnx("hstu").write_bytes(b"not onnx")
    with pytest.raises(ArtefactError, match=r"hstu.onnx is no ONNX file.*hstu-trt export"):
        read_graph(model, "hstu")
    model.onnx("mlp_head").unlink()
    with pytest.raises(ArtefactError, match=r"mlp_head.onnx is missing.*hstu-trt export"):
        read_graph(model, "mlp_head")
