"""Stages -> ONNX files: traced by torch.export, with the custom ops as nodes of domain ``hstu.trt``."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import opset20 as standard
from onnxscript.values import Op, Opset
from torch import Tensor
from torch.export import Dim as TorchDim

from hstu_trt.contract.ops import EMBEDDING_LOOKUP, HSTU_ATTENTION, OpSpec
from hstu_trt.contract.tensors import Dim, StageSpec, TensorSpec
from hstu_trt.export.onnx_functions import OPSET, add_functions, e4m3_zero
from hstu_trt.export.stages import TORCH_DTYPES, Stage

PRODUCER = "hstu-trt"
TABLE_PREFIX = "tables."
"""Of initialisers that stand for embedding tables."""

_ONNX_TYPES = {
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "float32": "tensor(float)",
    "float8_e4m3fn": "tensor(float8e4m3fn)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}
_ATTRIBUTE_KINDS = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT, "string": OpSchema.AttrType.STRING}

_TRACES = {"pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node"}

# Tokens of the traced example; small, and different from each other so that no two dims are mistaken for one.
_EXAMPLE_SIZES = {"users": 2, "norms": 3, "uih_tokens": 7, "candidates": 5}
_DERIVED_DIM = re.compile(r"(?P<base>.+)_x_(?P<factor>\d+)$")


def export_stage(stage: Stage, output_names: Iterable[str] = ()) -> onnx.ModelProto:
    """Traces a stage and returns its ONNX model, with names and dims of its spec and function bodies for its ops.

    output_names: names of outputs beyond the spec's.
    """
    names = [spec.name for spec in stage.spec.inputs]
    outputs = [spec.name for spec in stage.spec.outputs] + list(output_names)
    dims = _torch_dims(stage.spec.inputs)
    shapes = tuple(_dynamic_axes(spec, dims) for spec in stage.spec.inputs)
    with torch.no_grad(), _quiet_exporter():
        traced = torch.export.export(stage, example_inputs(stage.spec), dynamic_shapes=(shapes,), strict=False)
        program = torch.onnx.export(
            traced,
            input_names=names,
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
            custom_translation_table=_translations(),
        )
    assert program is not None
    model = program.model_proto
    _rename_dims(model, stage.spec)
    _rename_initializers(model)
    _drop_traces(model)
    add_functions(model)
    model.producer_name = PRODUCER
    return model


def _drop_traces(model: onnx.ModelProto) -> None:
    """Leaves out which line of code a node came from: the same model is the same file, and digest, after an edit."""
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key not in _TRACES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silences notes about packages that this export does not use (torchvision) and about PyTorch's own internals."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def example_inputs(spec: StageSpec) -> tuple[Tensor, ...]:
    """Valid inputs of a stage for tracing: two users, a few tokens."""
    return tuple(_example(tensor) for tensor in spec.inputs)


def _example(spec: TensorSpec) -> Tensor:
    shape = [_example_size(dim) if isinstance(dim, Dim) else dim for dim in spec.dims]
    if spec.name.endswith("_offsets"):
        tokens = _EXAMPLE_SIZES["uih_tokens" if spec.name.startswith("uih") else "candidates"]
        return torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    return torch.ones(shape, dtype=TORCH_DTYPES[spec.dtype])


def _example_size(dim: Dim) -> int:
    if dim.name == "users_plus_1":
        return _EXAMPLE_SIZES["users"] + 1
    derived = _DERIVED_DIM.match(dim.name)
    if derived:
        return _EXAMPLE_SIZES[derived["base"]] * int(derived["factor"])
    return _EXAMPLE_SIZES[dim.name]


def _torch_dims(specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """Contract dims as torch.export dims; ``users_plus_1`` and ``X_x_n`` are derived from users and X."""
    dims = {dim.name: dim for spec in specs for dim in spec.dims if isinstance(dim, Dim)}
    result: dict[str, Any] = {}
    for dim in dims.values():
        derived = _DERIVED_DIM.match(dim.name)
        base, factor = (derived["base"], int(derived["factor"])) if derived else (dim.name, 1)
        plus = dim.name == "users_plus_1"
        base = "users" if plus else base
        # No upper bound: a graph serves any size, and a deployment may be smaller than the traced example.
        root = result.setdefault(base, TorchDim(base, min=dim.min - 1 if plus else dim.min // factor))
        result[dim.name] = root + 1 if plus else factor * root if factor > 1 else root
    return result


def _dynamic_axes(spec: TensorSpec, dims: Mapping[str, Any]) -> dict[int, Any]:
    return {axis: dims[dim.name] for axis, dim in enumerate(spec.dims) if isinstance(dim, Dim)}


def _op(spec: OpSpec) -> Op:
    """The op with a schema, which the exporter needs to place a custom node."""
    inputs = [
        OpSchema.FormalParameter(
            port.name,
            f"T_{port.name}",
            param_option=OpSchema.FormalParameterOption.Optional
            if port.optional
            else OpSchema.FormalParameterOption.Single,
        )
        for port in spec.inputs
    ]
    ports = [port for port in spec.outputs if not port.optional]
    outputs = [OpSchema.FormalParameter(port.name, f"T_{port.name}") for port in ports]
    constraints = [
        (f"T_{port.name}", [_ONNX_TYPES[d] for d in port.dtypes], port.doc) for port in (*spec.inputs, *ports)
    ]
    attributes = [
        OpSchema.Attribute(a.name, _ATTRIBUTE_KINDS[a.kind], a.doc, required=True)
        for a in spec.attributes
        if not a.optional
    ]
    plugin = [
        OpSchema.Attribute(name, OpSchema.AttrType.STRING, "for TensorRT's parser", required=True)
        for name in spec.plugin_attributes
    ]
    schema = OpSchema(
        spec.name,
        spec.domain,
        int(spec.version),
        inputs=inputs,
        outputs=outputs,
        type_constraints=constraints,
        attributes=attributes + plugin,
    )
    return Op(Opset(spec.domain, int(spec.version)), spec.name, schema)


def _translations() -> dict[Any, Callable[..., Any]]:
    """Torch op -> function that places its ONNX node."""
    attention, lookup = _op(HSTU_ATTENTION), _op(EMBEDDING_LOOKUP)
    tensors = len(HSTU_ATTENTION.inputs)

    def place_attention(*arguments: Any) -> Any:
        alpha, causal, window, contextual, tail, group, output_type = arguments[tensors:]
        return attention(
            *arguments[:tensors],
            alpha=alpha,
            causal=int(causal),
            max_attn_len=window,
            contextual_seq_len=contextual,
            min_full_attn_seq_len=tail,
            candidate_group_size=group,
            output_type=int(output_type),
            **HSTU_ATTENTION.plugin_attributes,
        )

    def place_lookup(ids: Any, table: Any, table_name: str, output_type: Any) -> Any:
        return lookup(
            ids, table, table_name=table_name, output_type=int(output_type), **EMBEDDING_LOOKUP.plugin_attributes
        )

    def place_quantise(x: Any, scale: Any) -> Any:
        return standard.QuantizeLinear(x, scale, standard.Constant(value=e4m3_zero()))

    def place_dequantise(stored: Any, scale: Any) -> Any:
        return standard.DequantizeLinear(stored, scale, axis=0)

    return {
        torch.ops.hstu_trt.attention.default: place_attention,
        torch.ops.hstu_trt.embedding_lookup.default: place_lookup,
        torch.ops.hstu_trt.quantise.default: place_quantise,
        torch.ops.hstu_trt.dequantise.default: place_dequantise,
    }


def _rename_dims(model: onnx.ModelProto, spec: StageSpec) -> None:
    """Gives symbolic dims the contract's names, on inputs, outputs and everything between."""
    names: dict[str, str] = {}
    for value, tensor in zip(model.graph.input, spec.inputs, strict=True):
        for axis, dim in zip(value.type.tensor_type.shape.dim, tensor.dims, strict=True):
            if isinstance(dim, Dim):
                names[axis.dim_param] = dim.name
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = names.get(axis.dim_param) or _rename_symbols(axis.dim_param, names)


def _rename_symbols(expression: str, names: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), expression)


def _rename_initializers(model: onnx.ModelProto) -> None:
    """Weights carry the checkpoint's keys, tables are called ``tables.<name>``."""
    new = {}
    for initializer in model.graph.initializer:
        name = initializer.name.removeprefix("model.")
        table = re.match(r"(?:embedding\.)?table_(.+)", name)
        new[initializer.name] = f"{TABLE_PREFIX}{table[1]}" if table else name
        initializer.name = new[initializer.name]
    for node in model.graph.node:
        for n, name in enumerate(node.input):
            node.input[n] = new.get(name, name)
    # An initializer's shape stands in itself; a second copy would contradict it once a table gets its real rows.
    rest = [info for info in model.graph.value_info if info.name not in new]
    del model.graph.value_info[:]
    model.graph.value_info.extend(rest)
