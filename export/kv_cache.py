"""Reusing keys and values of a prefix: encode a history once, score candidates in micro-batches (M-FALCON).

Exact when N, positions and time buckets stay what they were; then a cached pass gives the bits of the full one but for
rounding. DlrmHSTU counts positions from the newest event and times from the query, so a cache holds for one request.
Shape suffixes: T tokens, D model width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_trt.export.layers import StuStack, TokenLayout


@dataclass(frozen=True)
class KvCache:
    """Keys [T, H, Dqk] and values [T, H, Dv] of each layer for packed prefixes; INT32 offsets [B+1]."""

    offsets: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def prefill(
    stack: StuStack, prefix_TD: Tensor, candidates_TD: Tensor, layout: TokenLayout, norm: Tensor
) -> tuple[Tensor, KvCache]:
    """Runs all rows through the layers and keeps the prefixes' keys and values. Returns ([Tp + Tc, D], cache)."""
    x, kept = torch.cat([prefix_TD, candidates_TD]), prefix_TD.shape[0]
    keys, values = [], []
    attend = stack.attend(layout.prefix_offsets, layout, norm)
    for layer in stack.layers:
        u, v, q, k = layer.project(x)
        x = layer.output(x, u, layer.attended(attend, q, k, v))
        keys.append(k[:kept])
        values.append(v[:kept])
    return x, KvCache(layout.prefix_offsets, tuple(keys), tuple(values))


def forward_cached(
    stack: StuStack, new_TD: Tensor, new_offsets: Tensor, candidate_offsets: Tensor, cache: KvCache, norm: Tensor
) -> Tensor:
    """Runs new rows only, over cached keys and values.

    new_TD: new prefix rows of all users, then candidates [Tn + Tc, D]; new_offsets: INT32 [B+1] of the new prefix
    rows, which stand behind the cached ones. Returns the new rows' outputs, [Tn + Tc, D].
    """
    layout = TokenLayout(cache.offsets + new_offsets, candidate_offsets)
    attend = stack.attend(new_offsets, layout, norm)
    x = new_TD
    for layer, cached_k, cached_v in zip(stack.layers, cache.keys, cache.values, strict=True):
        u, v, q, k = layer.project(x)
        k = _behind_cached(cached_k, k, cache.offsets, new_offsets)
        v = _behind_cached(cached_v, v, cache.offsets, new_offsets)
        x = layer.output(x, u, layer.attended(attend, q, k, v))
    return x


def _behind_cached(cached: Tensor, new: Tensor, cached_offsets: Tensor, new_offsets: Tensor) -> Tensor:
    """Packs each user's cached rows and new prefix rows together; candidates follow."""
    old, fresh = cached_offsets.tolist(), new_offsets.tolist()
    rows = [part for b in range(len(old) - 1) for part in (cached[old[b] : old[b + 1]], new[fresh[b] : fresh[b + 1]])]
    return torch.cat([*rows, new[fresh[-1] :]])
