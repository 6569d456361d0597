"""Function bodies of the custom ops: the same maths in standard ONNX operators.

A model carries them so that one .onnx file runs in plain ONNX Runtime, compiles in TensorRT-RTX, and maps to plugins in
TensorRT (the nodes' plugin attributes decide). The attention body is dense over all query and key rows, so its shapes
depend on no value; it is the fallback and the oracle, not the fast path.

Bodies are written in ONNX text syntax. Ids and time differences are bounded without Min, Max and Clip on INT64, since
ONNX Runtime's take values from 2^31 to 2^32 for negative ones on x86-64. Lines for the window, the contextual prefix,
the scale and the relative bias are there only in models that use them, since an ONNX function cannot test whether an
optional input is present.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.parser

from hstu_trt.contract.ops import EMBEDDING_LOOKUP, HSTU_ATTENTION, OP_DOMAIN, OpSpec
from hstu_trt.export.onnx_form import AttentionForm
from hstu_trt.export.onnx_mask import mask_lines, row_lines, shape_lines
from hstu_trt.export.onnx_products import product_lines, real_token_lines

OPSET = 20
# Of the nodes on e4m3 tokens in a model whose other attention nodes take real ones: two bodies of one op.
FP8_OVERLOAD = "fp8"
_OVERLOADS_SINCE_IR = 10


def attention_function(form: AttentionForm) -> onnx.FunctionProto:
    """The body of ``HstuAttention`` for a form."""
    q, k = ("q_real", "k_real") if form.quantised else ("q", "k")
    lines = [
        *(real_token_lines() if form.quantised else []),
        *shape_lines(),
        *row_lines("query", q),
        *row_lines("key", k),
        *mask_lines(form),
        *product_lines(form),
    ]
    inputs = [port.name for port in HSTU_ATTENTION.inputs if not port.optional]
    optional = [port.name for port in HSTU_ATTENTION.inputs if port.optional]
    if form.biased:
        inputs += optional
    elif form.scaled:
        inputs += optional[: optional.index("attn_scale") + 1]
    elif form.quantised:
        inputs += optional[: optional.index("v_scale") + 1]
    function = _function(HSTU_ATTENTION, inputs, lines)
    if form.quantised:
        function.node.insert(0, onnx.helper.make_node("Constant", [], ["e4m3_zero"], value=e4m3_zero()))
    return function


def e4m3_zero() -> onnx.TensorProto:
    """The zero point that tells QuantizeLinear to make e4m3; opset 20 has no other way."""
    return onnx.helper.make_tensor("e4m3_zero", onnx.TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)


def embedding_function() -> onnx.FunctionProto:
    """The body of ``EmbeddingLookup``: gather, and zeros for ids outside the table."""
    lines = [
        "zero = Constant <value_int: int = 0> ()",
        "row_axis = Constant <value_ints: ints = [1]> ()",
        "wide_ids = Cast <to: int = 7> (ids)",
        "row_count = Shape <start: int = 0, end: int = 1> (table)",
        "not_below = GreaterOrEqual (wide_ids, zero)",
        "not_beyond = Less (wide_ids, row_count)",
        "inside = And (not_below, not_beyond)",
        "safe_ids = Where (inside, wide_ids, zero)",
        "gathered = Gather <axis: int = 0> (table, safe_ids)",
        "cast = Cast <to: int = @output_type> (gathered)",
        "inside_column = Unsqueeze (inside, row_axis)",
        "nothing = CastLike (zero, cast)",
        "rows = Where (inside_column, cast, nothing)",
    ]
    return _function(EMBEDDING_LOOKUP, [port.name for port in EMBEDDING_LOOKUP.inputs], lines)


def _function(spec: OpSpec, inputs: list[str], lines: list[str]) -> onnx.FunctionProto:
    attributes = [a.name for a in spec.attributes if not a.optional] + list(spec.plugin_attributes)
    outputs = [port.name for port in spec.outputs if not port.optional]
    text = (
        f'<domain: "{spec.domain}", opset_import: ["" : {OPSET}]>\n'
        f"{spec.name} <{', '.join(attributes)}> ({', '.join(inputs)}) => ({', '.join(outputs)})\n"
        "{\n" + "".join(f"  {line}\n" for line in lines) + "}\n"
    )
    return onnx.parser.parse_function(text)


def add_functions(model: onnx.ModelProto) -> None:
    """Appends the bodies of the custom ops that a model uses. Raises ValueError when its nodes disagree on a form.

    Attention on e4m3 tokens and on real ones may stand in one model: then the former's nodes and body are an overload.
    """
    nodes = [node for node in model.graph.node if node.domain == OP_DOMAIN]
    attention = [(node, AttentionForm.of_node(node)) for node in nodes if node.op_type == HSTU_ATTENTION.name]
    forms = {form for _, form in attention}
    both = len({form.quantised for form in forms}) > 1
    if len(forms) > 1 + both:
        raise ValueError(f"attention nodes of one model use different options: {sorted(map(str, forms))}")
    for node, form in attention:
        node.overload = _overload(form, both)
    model.functions.extend(_attention_functions(forms, both))
    if both:
        model.ir_version = max(model.ir_version, _OVERLOADS_SINCE_IR)
    if any(node.op_type == EMBEDDING_LOOKUP.name for node in nodes):
        model.functions.append(embedding_function())


def _attention_functions(forms: Iterable[AttentionForm], both: bool) -> list[onnx.FunctionProto]:
    functions = []
    for form in sorted(forms, key=lambda form: form.quantised):
        function = attention_function(form)
        function.overload = _overload(form, both)
        functions.append(function)
    return functions


def _overload(form: AttentionForm, both: bool) -> str:
    return FP8_OVERLOAD if both and form.quantised else ""
