"""The kernels as torch ops ``hstu_trt::*``. Importing this module registers them; no GPU or library is needed for that.

The schemas of ``hstu_trt::attention`` and ``hstu_trt::embedding_lookup`` belong to the export room, whose ops run
anywhere in plain PyTorch. This room may not import that one, so it only adds CUDA kernels to the ops' names: the
dispatcher keeps them for the schemas, whichever of the two modules comes first. The other ops are this room's own.
Tensors of attention are those of ``plugins/parameters.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_trt.contract.ops import TORCH_NAMESPACE
from hstu_trt.plugins import attention as kernels
from hstu_trt.plugins import embedding
from hstu_trt.plugins.parameters import (
    VALUE_BLOCK_KEYS,
    AttentionCall,
    AttentionOptions,
    Cache,
    Offsets,
    RelativeBias,
    Scales,
    value_blocks,
)


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
    """``hstu_trt::attention`` (``HstuAttention`` of ``contract/ops.py``) on CUDA tensors; v as it is, or packed."""
    bias = None
    if position_bias is not None:
        assert time_bias is not None and query_timestamps is not None and key_timestamps is not None
        bias = RelativeBias(position_bias, time_bias, query_timestamps, key_timestamps)
    call = AttentionCall(
        q=q, k=k, v=v, offsets=Offsets(query_offsets, prefix_offsets, candidate_offsets), norm=norm,
        attn_scale=attn_scale, scales=_scales(q_scale, k_scale, v_scale), bias=bias,
        options=AttentionOptions(
            alpha, causal, max_attn_len, contextual_seq_len, min_full_attn_seq_len, candidate_group_size
        ),
    )  # fmt: skip
    return kernels.attention(call, output_dtype=output_dtype)


def _scales(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> Scales | None:
    if q is None:
        return None
    assert k is not None and v is not None
    return Scales(q, k, v)


def embedding_lookup(ids: Tensor, table: Tensor, table_name: str, output_dtype: torch.dtype) -> Tensor:
    """``hstu_trt::embedding_lookup`` (``EmbeddingLookup`` of ``contract/ops.py``) on CUDA tensors."""
    return embedding.lookup(ids, table, output_dtype)


# Kept alive: a Library that is collected takes its kernels with it.
_REGISTRATION = torch.library.Library(TORCH_NAMESPACE, "IMPL")
_REGISTRATION.impl("attention", attention, "CUDA")
_REGISTRATION.impl("embedding_lookup", embedding_lookup, "CUDA")


@torch.library.custom_op(f"{TORCH_NAMESPACE}::cached_attention", mutates_args=(), device_types="cuda")
def cached_attention(  # noqa: PLR0913, PLR0917 - an op's schema is flat
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached_k: Tensor,
    cached_v: Tensor,
    cached_offsets: Tensor,
    page_table: Tensor | None,
    query_offsets: Tensor,
    prefix_offsets: Tensor,
    candidate_offsets: Tensor,
    norm: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    attn_scale: Tensor | None,
    alpha: float,
    causal: bool,
    max_attn_len: int,
    contextual_seq_len: int,
    min_full_attn_seq_len: int,
    candidate_group_size: int,
    output_dtype: torch.dtype,
) -> Tensor:
    """``attention`` of new tokens behind a ``Cache``; the scales are given for e4m3 tokens, and then all of them."""
    call = AttentionCall(
        q=q, k=k, v=v, offsets=Offsets(query_offsets, prefix_offsets, candidate_offsets), norm=norm,
        attn_scale=attn_scale, scales=_scales(q_scale, k_scale, v_scale),
        cache=Cache(k=cached_k, v=cached_v, offsets=cached_offsets, page_table=page_table),
        options=AttentionOptions(
            alpha, causal, max_attn_len, contextual_seq_len, min_full_attn_seq_len, candidate_group_size
        ),
    )  # fmt: skip
    return kernels.attention(call, output_dtype=output_dtype)


@cached_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    output_dtype = rest[-1]
    assert isinstance(output_dtype, torch.dtype)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]), dtype=output_dtype)


@torch.library.custom_op(f"{TORCH_NAMESPACE}::pack_values", mutates_args=(), device_types="cuda")
def pack_values(v: Tensor, prefix_offsets: Tensor, candidate_offsets: Tensor) -> Tensor:
    """e4m3 values [Tk, H, Dv] -> value blocks [blocks, H, Dv, 128]."""
    return kernels.pack_values(v, prefix_offsets, candidate_offsets)


@pack_values.register_fake
def _(v: Tensor, prefix_offsets: Tensor, candidate_offsets: Tensor) -> Tensor:
    blocks = 2 * value_blocks(v.shape[0], prefix_offsets.shape[0] - 1)
    return v.new_empty(blocks, v.shape[1], v.shape[2], VALUE_BLOCK_KEYS)
