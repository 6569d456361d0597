"""HSTU attention in plain PyTorch: the oracle of every kernel, and the eager path of the model.

Shape suffixes: T tokens, Q query rows of one user, K key rows of one user, H heads, D head width, B users.
The token layout and the formula stand in ``contract/ops.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_trt.contract.ops import RESEARCH_TIME_BUCKET_DIVISOR


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """The mask's options, as attributes of the op (``contract/ops.py``)."""

    causal: bool = True
    max_attn_len: int = 0
    contextual_seq_len: int = 0
    min_full_attn_seq_len: int = 0
    candidate_group_size: int = 1


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """Bias tables of the HSTU paper and the timestamps they are indexed with.

    position: fp32 [2P-1], entry P-1 + j - i; time: fp32 [buckets+1];
    query_timestamps: int64 [Tq], of the token after the query; key_timestamps: int64 [Tk].
    """

    position: Tensor
    time: Tensor
    query_timestamps: Tensor
    key_timestamps: Tensor


@dataclass(frozen=True)
class _UserRows:
    """Row ranges of one user in q, and in k and v."""

    query_prefix: slice
    query_candidates: slice
    key_prefix: slice
    key_candidates: slice

    @property
    def prefix_length(self) -> int:
        return self.key_prefix.stop - self.key_prefix.start

    @property
    def candidates(self) -> int:
        return self.key_candidates.stop - self.key_candidates.start

    @property
    def first_query(self) -> int:
        """Local position of the first query row: queries are the last rows of the prefix."""
        return self.prefix_length - (self.query_prefix.stop - self.query_prefix.start)

    def queries(self, t: Tensor) -> Tensor:
        return torch.cat([t[self.query_prefix], t[self.query_candidates]])

    def keys(self, t: Tensor) -> Tensor:
        return torch.cat([t[self.key_prefix], t[self.key_candidates]])


def reference_attention(  # noqa: PLR0913 - the op, flat
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    offsets: tuple[Tensor, Tensor, Tensor],
    scale: Tensor,
    *,
    alpha: float,
    mask: MaskOptions,
    bias: RelativeBias | None = None,
    weights_dtype: torch.dtype | None = None,
) -> Tensor:
    """HSTU attention, one user at a time.

    offsets: (query_offsets, prefix_offsets, candidate_offsets), INT32 [B+1] each.
    scale: fp32, broadcastable to the query rows [Tq]: 1/N or the attn_scale.
    weights_dtype: what the weights SiLU(...) are rounded to before they meet the values; default: the values' dtype.
    Returns fp32 [Tq, H, Dv]. Products are taken in the inputs' dtype; SiLU, bias and scale in fp32.
    """
    out = torch.zeros(q_THD.shape[0], q_THD.shape[1], v_THD.shape[2], device=q_THD.device)
    scale_T = scale.expand(q_THD.shape[0])
    for rows in _user_rows(offsets):
        weights_HQK = torch.einsum("qhd,khd->hqk", rows.queries(q_THD) * alpha, rows.keys(k_THD)).float()
        if bias is not None:
            weights_HQK = weights_HQK + _bias(rows, bias)
        position_Q = torch.arange(rows.first_query, rows.prefix_length + rows.candidates, device=q_THD.device)
        valid_QK = valid_pairs(position_Q, rows.prefix_length, rows.candidates, mask)
        weights_HQK = torch.nn.functional.silu(weights_HQK) * valid_QK
        if weights_dtype is not None:
            largest = torch.finfo(weights_dtype).max
            weights_HQK = weights_HQK.clamp(-largest, largest).to(weights_dtype)
        user_out = torch.einsum("hqk,khd->qhd", weights_HQK.to(v_THD.dtype), rows.keys(v_THD)).float()
        user_out = user_out * rows.queries(scale_T)[:, None, None]
        prefix_rows = rows.query_prefix.stop - rows.query_prefix.start
        out[rows.query_prefix] = user_out[:prefix_rows]
        out[rows.query_candidates] = user_out[prefix_rows:]
    return out


def _user_rows(offsets: tuple[Tensor, Tensor, Tensor]) -> list[_UserRows]:
    query, prefix, candidate = (o.tolist() for o in offsets)
    return [
        _UserRows(
            query_prefix=slice(query[b], query[b + 1]),
            query_candidates=slice(query[-1] + candidate[b], query[-1] + candidate[b + 1]),
            key_prefix=slice(prefix[b], prefix[b + 1]),
            key_candidates=slice(prefix[-1] + candidate[b], prefix[-1] + candidate[b + 1]),
        )
        for b in range(len(prefix) - 1)
    ]


def valid_pairs(position_Q: Tensor, prefix_length: int, candidates: int, options: MaskOptions) -> Tensor:
    """The mask of queries of one user: bool [queries, keys], keys = prefix then candidates.

    position_Q: where the queries stand among the keys. Ids count from the first non-contextual token (contextual tokens
    are 0); candidates all have the last one. The rules are those of ``_get_valid_attn_mask`` in the reference's
    ops/pytorch/pt_hstu_attention.py; groups of candidates are ours.
    """
    contextual = max(options.contextual_seq_len - 1, 0) if options.contextual_seq_len else 0
    end = prefix_length - contextual
    position_K = torch.arange(prefix_length + candidates, device=position_Q.device)
    id_K = position_K
    if options.contextual_seq_len:
        id_K = (id_K - options.contextual_seq_len + 1).clamp(min=0)
    id_K = torch.where(position_K < prefix_length, id_K, end).clamp(max=end)
    id_Q, position_Q = id_K[position_Q, None], position_Q[:, None]
    distance = id_Q - id_K
    if not options.causal:
        distance = distance.abs()
    valid = (position_Q == position_K) | (distance > 0)
    if options.candidate_group_size > 1:
        valid |= _earlier_in_group(position_Q - prefix_length, position_K - prefix_length, options.candidate_group_size)
    if options.max_attn_len:
        near = distance <= options.max_attn_len
        if options.min_full_attn_seq_len:
            near |= id_Q >= end - options.min_full_attn_seq_len
        valid &= near
    if options.contextual_seq_len:
        valid |= (id_Q == 0) & (id_K < end)
    return valid


def _earlier_in_group(candidate_Q: Tensor, candidate_K: Tensor, group_size: int) -> Tensor:
    """Pairs of candidates of one group, the key before the query; prefix tokens have negative numbers."""
    group_Q, group_K = (candidate.div(group_size, rounding_mode="floor") for candidate in (candidate_Q, candidate_K))
    return (group_Q == group_K) & (candidate_K < candidate_Q) & (candidate_K >= 0)


def _bias(rows: _UserRows, bias: RelativeBias) -> Tensor:
    """Position plus time bias of one user's pairs, fp32 [queries, keys]."""
    device = bias.position.device
    position_K = torch.arange(rows.prefix_length + rows.candidates, device=device).clamp(max=rows.prefix_length)
    middle = (bias.position.shape[0] - 1) // 2
    index = middle + position_K - position_K[rows.first_query :, None]
    by_position = bias.position[index.clamp(0, bias.position.shape[0] - 1)]
    elapsed = rows.queries(bias.query_timestamps)[:, None] - rows.keys(bias.key_timestamps)
    return by_position + bias.time[time_bucket(elapsed, bias.time.shape[0] - 1)]


def time_bucket(elapsed_seconds: Tensor, last_bucket: int) -> Tensor:
    """The research model's bucket of a time difference: trunc(ln(max(|dt|, 1)) / 0.301), at most ``last_bucket``."""
    logarithm = elapsed_seconds.abs().clamp(min=1).float().log()
    return (logarithm / RESEARCH_TIME_BUCKET_DIVISOR).long().clamp(0, last_bucket)
