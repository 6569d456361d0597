"""Lines of the attention's ONNX function: scores, SiLU, values and scale, of the pairs let by ``onnx_mask.py``."""

from __future__ import annotations

from hstu_trt.contract.ops import RESEARCH_TIME_BUCKET_DIVISOR
from hstu_trt.export.onnx_form import AttentionForm


def real_token_lines() -> list[str]:
    """fp16 values of e4m3 tokens. Shapes are taken from them: ONNX Runtime has no Shape for e4m3."""
    return [
        line
        for name in ("q", "k", "v")
        for line in (
            f"{name}_step = Cast <to: int = 10> ({name}_scale)",
            f"{name}_real = DequantizeLinear <axis: int = 1> ({name}, {name}_step)",
        )
    ]


def product_lines(form: AttentionForm) -> list[str]:
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
