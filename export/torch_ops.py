"""The two custom ops as torch ops ``hstu_trt::*``, with fake implementations for tracing, and fp8 quantising.

The kernels registered here are plain PyTorch and run on any device. On a CUDA GPU the plugins room's kernel takes the
place of ``attention``'s where its ``torch_ops`` is imported as well, before or after this module.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_trt.contract.ops import TORCH_NAMESPACE
from hstu_trt.export.attention import MaskOptions, RelativeBias, reference_attention
from hstu_trt.export.fp8 import E4M3, from_e4m3, to_e4m3


@torch.library.custom_op(f"{TORCH_NAMESPACE}::attention", mutates_args=())
def attention(  # noqa: PLR0913, PLR0917 - an op's schema is flat
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    prefix_offsets: Tensor,
    candidate_offsets: Tensor,
    norm: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    attn_scale: Tensor | None,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    query_timestamps: Tensor | None,
    key_timestamps: Tensor | None,
    alpha: float,
    causal: bool,
    max_attn_len: int,
    contextual_seq_len: int,
    min_full_attn_seq_len: int,
    candidate_group_size: int,
    output_dtype: torch.dtype,
) -> Tensor:
    """``HstuAttention`` of ``contract/ops.py``: q [Tq, H, Dqk], k [Tk, H, Dqk], v [Tk, H, Dv] -> [Tq, H, Dv]."""
    bias = None
    if position_bias is not None:
        assert time_bias is not None and query_timestamps is not None and key_timestamps is not None
        bias = RelativeBias(
            position=position_bias, time=time_bias, query_timestamps=query_timestamps, key_timestamps=key_timestamps
        )
    mask = MaskOptions(
        causal=causal,
        max_attn_len=max_attn_len,
        contextual_seq_len=contextual_seq_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
        candidate_group_size=candidate_group_size,
    )
    weights_dtype = None
    if q_scale is not None:
        assert k_scale is not None and v_scale is not None
        weights_dtype = v.dtype
        q, k, v = (_real_values(*pair) for pair in ((q, q_scale), (k, k_scale), (v, v_scale)))
    offsets = (query_offsets, prefix_offsets, candidate_offsets)
    scale = attn_scale if attn_scale is not None else _per_query(1.0 / norm, query_offsets, candidate_offsets)
    out = reference_attention(q, k, v, offsets, scale, alpha=alpha, mask=mask, bias=bias, weights_dtype=weights_dtype)
    return out.to(output_dtype)


def _real_values(stored: Tensor, scale: Tensor) -> Tensor:
    """e4m3 tokens [T, H, D] and their scale [1] or [H] -> fp32."""
    return stored.float() * scale.view(-1, 1)


def _per_query(per_user: Tensor, query_offsets: Tensor, candidate_offsets: Tensor) -> Tensor:
    """Spreads a value per user [B] over the query rows [Tq]; a single value stays as it is."""
    if per_user.numel() == 1:
        return per_user
    prefix = per_user.repeat_interleave(query_offsets.diff())
    return torch.cat([prefix, per_user.repeat_interleave(candidate_offsets.diff())])


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    output_dtype = rest[-1]
    assert isinstance(output_dtype, torch.dtype)
    return torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=output_dtype, device=q.device)


@torch.library.custom_op(f"{TORCH_NAMESPACE}::embedding_lookup", mutates_args=())
def embedding_lookup(ids: Tensor, table: Tensor, table_name: str, output_dtype: torch.dtype) -> Tensor:
    """``EmbeddingLookup`` of ``contract/ops.py``: ids [n], table [rows, dim] -> [n, dim]; bad ids answer zeros."""
    inside = (ids >= 0) & (ids < table.shape[0])
    rows = table[ids.clamp(0, table.shape[0] - 1)].to(output_dtype)
    return torch.where(inside[:, None], rows, rows.new_zeros(()))


@embedding_lookup.register_fake
def _(ids: Tensor, table: Tensor, table_name: str, output_dtype: torch.dtype) -> Tensor:
    return torch.empty(ids.shape[0], table.shape[1], dtype=output_dtype, device=ids.device)


@torch.library.custom_op(f"{TORCH_NAMESPACE}::quantise", mutates_args=())
def quantise(x: Tensor, scale: Tensor) -> Tensor:
    """``fp8.to_e4m3``, as one op that becomes ONNX's QuantizeLinear."""
    return to_e4m3(x, scale)


@quantise.register_fake
def _(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=E4M3, device=x.device)


@torch.library.custom_op(f"{TORCH_NAMESPACE}::dequantise", mutates_args=())
def dequantise(stored: Tensor, scale: Tensor) -> Tensor:
    """``fp8.from_e4m3``, as one op that becomes ONNX's DequantizeLinear."""
    return from_e4m3(stored, scale)


@dequantise.register_fake
def _(stored: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(stored.shape, dtype=scale.dtype, device=stored.device)
