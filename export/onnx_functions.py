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
from dataclasses import dataclass

import onnx
import onnx.parser

from hstu_trt.contract.ops import (
    EMBEDDING_LOOKUP,
    HSTU_ATTENTION,
    OP_DOMAIN,
    RESEARCH_TIME_BUCKET_DIVISOR,
    OpSpec,
)

OPSET = 20
# Of the nodes on e4m3 tokens in a model whose other attention nodes take real ones: two bodies of one op.
FP8_OVERLOAD = "fp8"
_OVERLOADS_SINCE_IR = 10


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """Which optional parts an attention node uses; nodes of one model must agree, since they share one body."""

    causal: bool = True
    window: bool = False
    contextual: bool = False
    full_tail: bool = False
    grouped: bool = False
    scaled: bool = False
    biased: bool = False
    quantised: bool = False
    """Tokens are e4m3."""

    @classmethod
    def of_node(cls, node: onnx.NodeProto) -> AttentionForm:
        """The form of an ``HstuAttention`` node."""
        values = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        given = {port.name for port, name in zip(HSTU_ATTENTION.inputs, node.input, strict=False) if name}
        return cls(
            causal=bool(values["causal"]),
            window=values["max_attn_len"] > 0,
            contextual=values["contextual_seq_len"] > 0,
            full_tail=values["min_full_attn_seq_len"] > 0,
            grouped=values["candidate_group_size"] > 1,
            scaled="attn_scale" in given,
            biased="position_bias" in given,
            quantised="q_scale" in given,
        )


def attention_function(form: AttentionForm) -> onnx.FunctionProto:
    """The body of ``HstuAttention`` for a form."""
    q, k = ("q_real", "k_real") if form.quantised else ("q", "k")
    lines = [
        *(_real_tokens() if form.quantised else []),
        *_shapes(),
        *_rows("query", q),
        *_rows("key", k),
        *_mask(form),
        *_products(form),
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


def _shapes() -> list[str]:
    """Users and the ends of each run of rows: all prefixes, then all candidates."""
    return [
        "zero = Constant <value_int: int = 0> ()",
        "one = Constant <value_int: int = 1> ()",
        "first = Constant <value_ints: ints = [0]> ()",
        "second = Constant <value_ints: ints = [1]> ()",
        "minus_one = Constant <value_ints: ints = [-1]> ()",
        "far = Constant <value_ints: ints = [9223372036854775807]> ()",
        "query_bounds = Cast <to: int = 7> (query_offsets)",
        "key_bounds = Cast <to: int = 7> (prefix_offsets)",
        "candidate_bounds = Cast <to: int = 7> (candidate_offsets)",
        "key_ends = Slice (key_bounds, second, far, first)",
        "key_begins = Slice (key_bounds, first, minus_one, first)",
        "prefix_lengths = Sub (key_ends, key_begins)",
        "query_ends = Slice (query_bounds, second, far, first)",
        "query_begins = Slice (query_bounds, first, minus_one, first)",
        "query_lengths = Sub (query_ends, query_begins)",
        "unqueried = Sub (prefix_lengths, query_lengths)",
        "users = Shape (prefix_lengths)",
        "user_count = Squeeze (users)",
    ]


def _real_tokens() -> list[str]:
    """fp16 values of e4m3 tokens. Shapes are taken from them: ONNX Runtime has no Shape for e4m3."""
    return [
        line
        for name in ("q", "k", "v")
        for line in (
            f"{name}_step = Cast <to: int = 10> ({name}_scale)",
            f"{name}_real = DequantizeLinear <axis: int = 1> ({name}, {name}_step)",
        )
    ]


def _rows(side: str, source: str) -> list[str]:
    """For each query (or key) row: user, candidate or not, position in the user's prefix, and id for the mask.

    source: the tokens, whose rows are counted.
    """
    local = {
        # Queries are the last rows of a prefix, so their positions begin behind the rows that are not queried.
        "query": ["query_skip = Gather (unqueried, query_user)", "query_local = Add (query_in_run, query_skip)"],
        "key": ["key_local = Identity (key_in_run)"],
    }[side]
    lines = [
        "S_total = Gather (S_bounds, user_count)",
        "S_candidate_bounds = Add (candidate_bounds, S_total)",
        "S_candidate_ends = Slice (S_candidate_bounds, second, far, first)",
        "S_candidate_begins = Slice (S_candidate_bounds, first, minus_one, first)",
        "S_run_ends = Concat <axis: int = 0> (S_ends, S_candidate_ends)",
        "S_run_begins = Concat <axis: int = 0> (S_begins, S_candidate_begins)",
        f"S_row_count = Shape <start: int = 0, end: int = 1> ({source})",
        "S_row_limit = Squeeze (S_row_count)",
        "S_index = Range (zero, S_row_limit, one)",
        "S_index_column = Unsqueeze (S_index, second)",
        "S_is_past = GreaterOrEqual (S_index_column, S_run_ends)",
        "S_past = Cast <to: int = 7> (S_is_past)",
        "S_run = ReduceSum <keepdims: int = 0> (S_past, second)",
        "S_user = Mod (S_run, user_count)",
        "S_is_candidate = GreaterOrEqual (S_run, user_count)",
        "S_run_begin = Gather (S_run_begins, S_run)",
        "S_in_run = Sub (S_index, S_run_begin)",
        *local,
        "S_prefix_length = Gather (prefix_lengths, S_user)",
        "S_position = Where (S_is_candidate, S_prefix_length, S_local)",
    ]
    return [line.replace("S_", f"{side}_") for line in lines]


def _mask(form: AttentionForm) -> list[str]:
    """bool [Tq, Tk]: which keys a query sees. Pairs are compared in INT32, which halves the largest tensors."""
    return [
        *_mask_ids(form, "query"),
        *_mask_ids(form, "key"),
        "query_id_column = Unsqueeze (query_id, second)",
        "signed_distance = Sub (query_id_column, key_id)",
        "distance = Identity (signed_distance)" if form.causal else "distance = Abs (signed_distance)",
        "zero_id = Cast <to: int = 6> (zero)",
        "before = Greater (distance, zero_id)",
        # The key row of a query: its own place among the keys.
        "own_prefix_begin = Gather (key_begins, query_user)",
        "own_prefix_row = Add (own_prefix_begin, query_local)",
        "own_candidate_row_0 = Sub (query_index, query_total)",
        "own_candidate_row = Add (own_candidate_row_0, key_total)",
        "own_row = Where (query_is_candidate, own_candidate_row, own_prefix_row)",
        "own_row_id = Cast <to: int = 6> (own_row)",
        "own_row_column = Unsqueeze (own_row_id, second)",
        "key_index_id = Cast <to: int = 6> (key_index)",
        "itself = Equal (own_row_column, key_index_id)",
        *(_groups() if form.grouped else ["ordered = Or (before, itself)"]),
        *(_window(form) if form.window else ["windowed = Identity (ordered)"]),
        *(_contextual() if form.contextual else ["with_context = Identity (windowed)"]),
        "query_user_id = Cast <to: int = 6> (query_user)",
        "query_user_column = Unsqueeze (query_user_id, second)",
        "key_user_id = Cast <to: int = 6> (key_user)",
        "same_user = Equal (query_user_column, key_user_id)",
        "valid = And (with_context, same_user)",
    ]


def _mask_ids(form: AttentionForm, side: str) -> list[str]:
    """Ids count from the first non-contextual token (contextual tokens are 0); candidates stand at the end."""
    if not form.contextual:
        return [
            f"{side}_id = Cast <to: int = 6> ({side}_position)",
            f"{side}_end = Cast <to: int = 6> ({side}_prefix_length)",
        ]
    lines = [
        "S_contextual = Constant <value_int: int = @contextual_seq_len> ()",
        "S_contextual_but_one = Sub (S_contextual, one)",
        "S_wide_end = Sub (S_prefix_length, S_contextual_but_one)",
        "S_shifted = Sub (S_position, S_contextual_but_one)",
        "S_counted = Max (S_shifted, zero)",
        "S_raw_id = Where (S_is_candidate, S_wide_end, S_counted)",
        "S_wide_id = Min (S_raw_id, S_wide_end)",
        "S_id = Cast <to: int = 6> (S_wide_id)",
        "S_end = Cast <to: int = 6> (S_wide_end)",
    ]
    return [line.replace("S_", f"{side}_") for line in lines]


def _groups() -> list[str]:
    """Candidates see the earlier ones of their group. Prefix rows are in none: -1 for queries, -2 for keys."""
    numbers = [
        "S_group_of_run = Div (S_in_run, group_size)",
        "S_wide_group = Where (S_is_candidate, S_group_of_run, S_in_no_group)",
        "S_group = Cast <to: int = 6> (S_wide_group)",
        "S_in_run_id = Cast <to: int = 6> (S_in_run)",
    ]
    return [
        "group_size = Constant <value_int: int = @candidate_group_size> ()",
        "query_in_no_group = Constant <value_int: int = -1> ()",
        "key_in_no_group = Constant <value_int: int = -2> ()",
        *(line.replace("S_", f"{side}_") for side in ("query", "key") for line in numbers),
        "query_group_column = Unsqueeze (query_group, second)",
        "same_group = Equal (query_group_column, key_group)",
        "query_in_run_column = Unsqueeze (query_in_run_id, second)",
        "earlier_in_run = Greater (query_in_run_column, key_in_run_id)",
        "earlier_in_group = And (same_group, earlier_in_run)",
        "before_or_grouped = Or (before, earlier_in_group)",
        "ordered = Or (before_or_grouped, itself)",
    ]


def _window(form: AttentionForm) -> list[str]:
    near = [
        "wide_window = Constant <value_int: int = @max_attn_len> ()",
        "window = Cast <to: int = 6> (wide_window)",
        "near_by_distance = LessOrEqual (distance, window)",
    ]
    tail = [
        "wide_tail_length = Constant <value_int: int = @min_full_attn_seq_len> ()",
        "tail_length = Cast <to: int = 6> (wide_tail_length)",
        "tail_begin = Sub (query_end, tail_length)",
        "in_tail = GreaterOrEqual (query_id, tail_begin)",
        "in_tail_column = Unsqueeze (in_tail, second)",
        "near = Or (near_by_distance, in_tail_column)",
    ]
    rest = tail if form.full_tail else ["near = Identity (near_by_distance)"]
    return [*near, *rest, "windowed = And (ordered, near)"]


def _contextual() -> list[str]:
    return [
        "query_in_context = Equal (query_id_column, zero_id)",
        "key_in_prefix = Less (key_id, key_end)",
        "context_pair = And (query_in_context, key_in_prefix)",
        "with_context = Or (windowed, context_pair)",
    ]


def _products(form: AttentionForm) -> list[str]:
    """Scores, SiLU, mask, values, scale. Products in the inputs' type, everything between them in fp32."""
    return [
        "alpha_value = Constant <value_float: float = @alpha> ()",
        *(_quantised_scores() if form.quantised else _scores()),
        *(_bias() if form.biased else ["scores = Identity (wide_scores)"]),
        "gate = Sigmoid (scores)",
        "silu = Mul (scores, gate)",
        "no_weight = Constant <value_float: float = 0.0> ()",
        "masked = Where (valid, silu, no_weight)",
        *(_quantised_weights() if form.quantised else ["weights = CastLike (masked, v)"]),
        "weighted = MatMul (weights, v_by_head)",
        "by_token = Transpose <perm: ints = [1, 0, 2]> (weighted)",
        "wide_out = Cast <to: int = 1> (by_token)",
        *_scale(form),
        "scale_shape = Constant <value_ints: ints = [-1, 1, 1]> ()",
        "scale_column = Reshape (scale, scale_shape)",
        "scaled_out = Mul (wide_out, scale_column)",
        "out = Cast <to: int = @output_type> (scaled_out)",
    ]


def _scores() -> list[str]:
    return [
        "typed_alpha = CastLike (alpha_value, q)",
        "scaled_q = Mul (q, typed_alpha)",
        "q_by_head = Transpose <perm: ints = [1, 0, 2]> (scaled_q)",
        "k_by_head = Transpose <perm: ints = [1, 2, 0]> (k)",
        "v_by_head = Transpose <perm: ints = [1, 0, 2]> (v)",
        "raw_scores = MatMul (q_by_head, k_by_head)",
        "wide_scores = Cast <to: int = 1> (raw_scores)",
    ]


def _quantised_scores() -> list[str]:
    """Of e4m3 tokens. Nothing but a transposition stands between DequantizeLinear and the products, so that a builder
    can take the stored values to fp8 tensor cores; hence alpha comes after."""
    return [
        "q_by_head = Transpose <perm: ints = [1, 0, 2]> (q_real)",
        "k_by_head = Transpose <perm: ints = [1, 2, 0]> (k_real)",
        "v_by_head = Transpose <perm: ints = [1, 0, 2]> (v_real)",
        "raw_scores = MatMul (q_by_head, k_by_head)",
        "unscaled_scores = Cast <to: int = 1> (raw_scores)",
        "wide_scores = Mul (unscaled_scores, alpha_value)",
    ]


def _quantised_weights() -> list[str]:
    """The weights as the kernels take them to the values: rounded to e4m3, without a scale of their own."""
    return [
        "one_step_wide = Constant <value_float: float = 1.0> ()",
        "one_step = Cast <to: int = 10> (one_step_wide)",
        "half_masked = Cast <to: int = 10> (masked)",
        "stored_weights = QuantizeLinear (half_masked, one_step, e4m3_zero)",
        "weights = DequantizeLinear (stored_weights, one_step)",
    ]


def _scale(form: AttentionForm) -> list[str]:
    """1/N per query row, from one N or one per user; or the given scale."""
    if form.scaled:
        return ["scale = Identity (attn_scale)"]
    return [
        "norm_by_user = Expand (norm, users)",
        "norm_by_query = Gather (norm_by_user, query_user)",
        "scale = Reciprocal (norm_by_query)",
    ]


def _bias() -> list[str]:
    """Position bias at P-1 + j - i and time bias at the bucket of the elapsed seconds, both fp32 [Tq, Tk]."""
    return [
        "two = Constant <value_int: int = 2> ()",
        "position_rows = Size (position_bias)",
        "position_last = Sub (position_rows, one)",
        "position_middle = Div (position_last, two)",
        "query_position_column = Unsqueeze (query_position, second)",
        "relative = Sub (key_position, query_position_column)",
        "position_index = Add (relative, position_middle)",
        "position_low = Max (position_index, zero)",
        "position_entry = Min (position_low, position_last)",
        "by_position = Gather (position_bias, position_entry)",
        "query_time_column = Unsqueeze (query_timestamps, second)",
        "signed_elapsed = Sub (query_time_column, key_timestamps)",
        "elapsed = Abs (signed_elapsed)",
        "wide_elapsed = Cast <to: int = 1> (elapsed)",
        "one_second = Constant <value_float: float = 1.0> ()",
        "elapsed_or_one = Max (wide_elapsed, one_second)",
        "log_elapsed = Log (elapsed_or_one)",
        f"divisor = Constant <value_float: float = {RESEARCH_TIME_BUCKET_DIVISOR}> ()",
        "raw_bucket = Div (log_elapsed, divisor)",
        "whole_bucket = Cast <to: int = 7> (raw_bucket)",
        "time_rows = Size (time_bias)",
        "time_last = Sub (time_rows, one)",
        "bucket = Min (whole_bucket, time_last)",
        "by_time = Gather (time_bias, bucket)",
        "both_biases = Add (by_position, by_time)",
        "scores = Add (wide_scores, both_biases)",
    ]


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
