"""An exported stage -> the graph that a builder parses.

With plugins (TensorRT): function bodies are taken out, so that a plugin that is missing is an error instead of a slow
engine. Tables stay outside: ``EmbeddingLookup`` loses its second input, and the plugin finds the table by its name in
the folder HSTU_TRT_TABLES, when it is built (for the width of a row) and when it runs. A plan so never holds a table.

Without plugins (TensorRT-RTX, or ``--no-plugins``): functions are inlined, with a name of its own for every node, since
the parser renames layers of a function that is called twice into each other. Tables become constants of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.inliner

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model_folder import REGENERATE, ModelFolder
from hstu_trt.contract.ops import EMBEDDING_LOOKUP, OP_DOMAIN

_TABLE_INPUT = [port.name for port in EMBEDDING_LOOKUP.inputs].index("table")
_TENSOR_BYTES = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2}


@dataclass(frozen=True, kw_only=True)
class StageGraph:
    """What is parsed for one stage."""

    path: Path
    """The stage's .onnx file; weights lie beside it."""
    model: onnx.ModelProto
    op_nodes: int
    """Nodes of our ops in the exported file."""
    plugin_layers: int
    """Plugin layers that the parsed network must have."""
    lookups: int
    """EmbeddingLookup nodes among them, and so tables that a plan leaves out."""

    @property
    def has_dense_attention(self) -> bool:
        """Whether attention runs as its function body."""
        return self.op_nodes > self.lookups and not self.plugin_layers

    def serialized(self) -> bytes:
        """The graph without its external data."""
        return self.model.SerializeToString()


def read_graph(model: ModelFolder, stage: str) -> onnx.ModelProto:
    """The exported graph of a stage without its weights. Raises ArtefactError."""
    path, remedy = model.onnx(stage), f"make it again with: {REGENERATE.format(folder=model.path)}"
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; {remedy}")
    try:
        graph = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's exceptions share no other base
        raise ArtefactError(f"{path} is no ONNX file ({error}); {remedy}") from None
    for node in graph.graph.node:
        if node.op_type == EMBEDDING_LOOKUP.name and node.domain == OP_DOMAIN and len(node.input) <= _TABLE_INPUT:
            raise ArtefactError(f"{path}: node {node.name!r} looks up in no table; {remedy}")
    return graph


def prepare(graph: onnx.ModelProto, path: Path, *, plugins: bool) -> StageGraph:
    """The graph for a builder; ``graph`` itself stays as it is."""
    nodes = [node for node in graph.graph.node if node.domain == OP_DOMAIN]
    if plugins:
        prepared = onnx.ModelProto()
        prepared.CopyFrom(graph)
        del prepared.functions[:]
        _leave_tables_out(prepared)
        # With the functions gone an overload names nothing; a plugin is found by domain, type and version.
        for node in prepared.graph.node:
            node.ClearField("overload")
    else:
        prepared = onnx.inliner.inline_local_functions(graph)
        for number, node in enumerate(prepared.graph.node):
            node.name = f"{node.op_type}_{number}"
    return StageGraph(
        path=path,
        model=prepared,
        op_nodes=len(nodes),
        plugin_layers=len(nodes) if plugins else 0,
        lookups=sum(node.op_type == EMBEDDING_LOOKUP.name for node in nodes),
    )


def table_bytes(graph: onnx.ModelProto) -> int:
    """Bytes of the embedding tables that a graph refers to."""
    tables = _table_names(graph)
    sizes = (_TENSOR_BYTES[t.data_type] * t.dims[0] * t.dims[1] for t in graph.graph.initializer if t.name in tables)
    return sum(sizes)


def _table_names(graph: onnx.ModelProto) -> set[str]:
    lookups = (node for node in graph.graph.node if node.op_type == EMBEDDING_LOOKUP.name and node.domain == OP_DOMAIN)
    return {node.input[_TABLE_INPUT] for node in lookups}


def _leave_tables_out(graph: onnx.ModelProto) -> None:
    tables = _table_names(graph)
    for node in graph.graph.node:
        if node.op_type == EMBEDDING_LOOKUP.name and node.domain == OP_DOMAIN:
            del node.input[_TABLE_INPUT:]
    kept = [initializer for initializer in graph.graph.initializer if initializer.name not in tables]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)
