"""Calls for the kernels out of a case's tokens: layouts, caches, value blocks; and the same call in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from attention_inputs import DTYPES, Case, Tokens
from torch import Tensor

from hstu_trt.export.attention import MaskOptions, time_bucket, valid_pairs
from hstu_trt.plugins.attention import E4M3_MAX
from hstu_trt.plugins.parameters import (
    VALUE_BLOCK_KEYS,
    AttentionCall,
    Cache,
    Offsets,
    RelativeBias,
    Scales,
    value_blocks,
)

# (values, prefix offsets, candidate offsets) -> value blocks
Pack = Callable[[Tensor, Tensor, Tensor], Tensor]


def assemble(case: Case, tokens: Tokens, chosen: Sequence[int], pack: Pack) -> AttentionCall:
    """The call of the chosen users, as the case lays it out."""
    users = [case.users[n] for n in chosen]
    device = tokens.norm.device

    def rows_of(tensors: Sequence[Tensor], first: Callable[[int], int]) -> Tensor:
        prefix = [tensors[n][first(n) : case.users[n].prefix] for n in chosen]
        return _cat(tensors, [*prefix, *(tensors[n][case.users[n].prefix :] for n in chosen)])

    def queries(tensors: Sequence[Tensor]) -> Tensor:
        return _with_slack(rows_of(tensors, lambda n: case.users[n].prefix - case.users[n].queries), case.slack)

    def keys(tensors: Sequence[Tensor]) -> Tensor:
        return _with_slack(rows_of(tensors, lambda n: case.users[n].cached), case.slack)

    offsets = Offsets(
        _offsets([user.queries for user in users], device),
        _offsets([user.rows for user in users], device),
        _offsets([user.candidates for user in users], device),
    )
    q, k, v = _lay_out(case, queries(tokens.q), keys(tokens.k), keys(tokens.v))
    if case.packed_values:
        # Packing asks for 4-byte alignment, which the odd layout denies.
        v = pack(keys(tokens.v) if case.layout == "odd" else v, offsets.prefix, offsets.candidate)
    scale = tokens.attn_scale
    bias = RelativeBias(tokens.position_bias, tokens.time_bias, queries(tokens.timestamps), keys(tokens.timestamps))
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        offsets=offsets,
        norm=tokens.norm if case.norm == "one" else tokens.norm[list(chosen)],
        options=case.options,
        attn_scale=queries(scale) if scale and case.attn_scale == "rows" else scale[0] if scale else None,
        cache=_cache(case, tokens, chosen, pack),
        scales=Scales(*tokens.scales) if tokens.scales else None,
        bias=bias if case.bias else None,
    )


def _cat(like: Sequence[Tensor], parts: list[Tensor]) -> Tensor:
    """torch.cat, for e4m3 too, and of no parts."""
    if not parts:
        return like[0][:0]
    if parts[0].dtype != torch.float8_e4m3fn:
        return torch.cat(parts)
    return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
    return ends.to(device=device, dtype=torch.int32)


def _with_slack(rows: Tensor, slack: int) -> Tensor:
    """More rows behind, of NaN or of a number that no timestamp is."""
    out = _poison((rows.shape[0] + slack, *rows.shape[1:]), rows)
    out[: rows.shape[0]] = rows
    return out


def _poison(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.dtype == torch.float8_e4m3fn:
        return torch.full(shape, 0x7F, dtype=torch.uint8, device=like.device).view(like.dtype)
    return torch.full(shape, float("nan") if like.is_floating_point() else -1, dtype=like.dtype, device=like.device)


def _lay_out(case: Case, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """q, k and v with the strides of the case's layout, NaN between the rows."""
    if case.layout == "packed":
        return [q, k, v]
    if case.layout == "uvqk" and q.shape[0] == k.shape[0]:
        widths = [t.shape[1] * t.shape[2] for t in (v, v, q, k)]
        _, *slices = _poison((q.shape[0], sum(widths)), q).split(widths, dim=1)
        views = [part.unflatten(1, t.shape[1:]) for part, t in zip(slices, (v, q, k), strict=True)]
        for view, t in zip(views, (v, q, k), strict=True):
            view.copy_(t)
        return [views[1], views[2], views[0]]
    pad, shift = (1, 1) if case.layout == "odd" else (16, 0)
    return [_spread(t, pad, shift) for t in (q, k, v)]


def _spread(rows: Tensor, pad: int, shift: int) -> Tensor:
    """A copy with ``pad`` elements between rows, ``shift`` elements into its storage."""
    count, heads, dim = rows.shape
    memory = _poison((count * (heads * dim + pad) + shift,), rows)
    view = memory[shift:].as_strided((count, heads, dim), (heads * dim + pad, dim, 1))
    return view.copy_(rows)


def _cache(case: Case, tokens: Tokens, chosen: Sequence[int], pack: Pack) -> Cache | None:
    if case.cache == "none":
        return None
    lengths = [case.users[n].cached for n in chosen]
    offsets = _offsets(lengths, tokens.norm.device)
    k = [tokens.k[n][: case.users[n].cached] for n in chosen]
    v = [tokens.v[n][: case.users[n].cached] for n in chosen]
    if case.cache == "paged":
        return _paged(case, k, v, offsets, pack)
    flat_k, flat_v = _cat(tokens.k, k), _cat(tokens.v, v)
    if case.dtype == "fp8":
        flat_v = pack(flat_v, offsets, torch.zeros_like(offsets))[: value_blocks(flat_v.shape[0], len(chosen))]
    return Cache(k=flat_k, v=flat_v, offsets=offsets)


def _paged(case: Case, k: list[Tensor], v: list[Tensor], offsets: Tensor, pack: Pack) -> Cache:
    """Pages in shuffled order. What no token fills is NaN, but zero in fp8 values; spare entries name an empty one."""
    size, device = case.page_size, offsets.device
    needed = [-(-len(rows) // size) for rows in k]
    count = sum(needed) + 1
    order = random.Random(case.seed).sample(range(count), count)
    like_k, like_v = ([*tensors, torch.empty(0, dtype=DTYPES[case.dtype], device=device)][0] for tensors in (k, v))
    pages_k = _poison((count, size, case.heads, case.qk_dim), like_k)
    pages_v = _poison((count, size, case.heads, case.v_dim), like_v)
    if case.dtype == "fp8":
        pages_v.view(torch.uint8).zero_()
    table = torch.full((len(k), max([*needed, 1])), order[-1], dtype=torch.int32)
    for user, (rows_k, rows_v) in enumerate(zip(k, v, strict=True)):
        for n in range(needed[user]):
            page = order[sum(needed[:user]) + n]
            part = slice(n * size, (n + 1) * size)
            pages_k[page, : len(rows_k[part])] = rows_k[part]
            pages_v[page, : len(rows_v[part])] = rows_v[part]
            table[user, n] = page
    if case.dtype == "fp8":
        # Every page packed as a user of 128 rows: its block is number 2 * page.
        each = _offsets([size] * count, device)
        pages_v = pack(pages_v.flatten(0, 1), each, torch.zeros_like(each))[: 2 * count : 2].contiguous()
    return Cache(k=pages_k, v=pages_v, offsets=offsets, page_table=table.to(device))


def packed_values(v: Tensor, prefix_offsets: Tensor, candidate_offsets: Tensor) -> Tensor:
    """Value blocks as kernels/attention/value_blocks.h defines them, in PyTorch. Unused blocks are zero."""
    users, section = len(prefix_offsets) - 1, value_blocks(v.shape[0], len(prefix_offsets) - 1)
    blocks = torch.zeros(
        2 * section, VALUE_BLOCK_KEYS, v.shape[1], v.shape[2], dtype=torch.uint8, device=v.device
    )  # fmt: skip
    bounds, behind = (prefix_offsets.tolist(), candidate_offsets.tolist()), prefix_offsets.tolist()[-1]
    for first_block, first_row, ends in ((0, 0, bounds[0]), (section, behind, bounds[1])):
        for user in range(users):
            rows = v[first_row + ends[user] : first_row + ends[user + 1]].view(torch.uint8)
            begin = first_block + ends[user] // VALUE_BLOCK_KEYS + user
            for n in range(0, len(rows), VALUE_BLOCK_KEYS):
                part = rows[n : n + VALUE_BLOCK_KEYS]
                blocks[begin + n // VALUE_BLOCK_KEYS, : len(part)] = part
    key_of_slot = [2 * t + i if i < 2 else 6 + 2 * t + i for t in range(4) for i in range(4)]
    order = [16 * n + key for n in range(VALUE_BLOCK_KEYS // 16) for key in key_of_slot]
    return blocks[:, order].permute(0, 2, 3, 1).contiguous().view(v.dtype)


class Sample(NamedTuple):
    """Exact rows of a call."""

    rows: Tensor
    """Their numbers in the output."""
    out: Tensor
    """float64 [rows, H, Dv]."""


def exact(case: Case, tokens: Tokens, every: int = 1, weights: torch.dtype = torch.float64) -> Sample:
    """Each ``every``-th row of each user's output in float64, on the values that the kernels read.

    weights: the type that SiLU of the scores is rounded to.
    """
    rows = [tokens.norm.new_zeros(0, dtype=torch.int64)]
    outs = [tokens.norm.new_zeros((0, case.heads, case.v_dim), dtype=torch.float64)]
    for n, numbers in enumerate(rows_of_users(case, tokens.norm.device)):
        first = case.users[n].prefix - case.users[n].queries
        taken = torch.arange(n % every, len(numbers), every, device=numbers.device)
        rows.append(numbers[taken])
        outs.append(_exact_user(case, tokens, n, taken + first, weights))
    return Sample(torch.cat(rows), torch.cat(outs))


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of a type, as x's type; e4m3 saturates."""
    near = x.clamp(-E4M3_MAX, E4M3_MAX) if dtype == torch.float8_e4m3fn else x
    return near.to(dtype).to(x.dtype)


def rows_of_users(case: Case, device: torch.device) -> list[Tensor]:
    """Rows of the output that belong to each user: queries of the prefix, then candidates."""
    query, candidate = 0, sum(user.queries for user in case.users)
    rows = []
    for user in case.users:
        ranges = ((query, user.queries), (candidate, user.candidates))
        rows.append(torch.cat([torch.arange(first, first + count, device=device) for first, count in ranges]))
        query, candidate = query + user.queries, candidate + user.candidates
    return rows


def _exact_user(case: Case, tokens: Tokens, n: int, position: Tensor, dtype: torch.dtype) -> Tensor:
    user = case.users[n]
    q, k, v = (_real(tensors[n], side, tokens) for side, tensors in enumerate((tokens.q, tokens.k, tokens.v)))
    scores = case.options.alpha * torch.einsum("qhd,khd->hqk", q[position], k)
    if case.bias:
        scores = scores + _exact_bias(tokens, n, user.prefix, position)
    mask = MaskOptions(**{name: value for name, value in vars(case.options).items() if name != "alpha"})
    valid = valid_pairs(position, user.prefix, user.candidates, mask)
    weights = rounded(torch.where(valid, torch.nn.functional.silu(scores), 0.0), dtype)
    return torch.einsum("hqk,khd->qhd", weights, v) * row_scale(case, tokens, n, position)[..., None, None]


def _real(rows: Tensor, side: int, tokens: Tokens) -> Tensor:
    real = rows.double()
    return real * tokens.scales[side].double()[:, None] if tokens.scales else real


def row_scale(case: Case, tokens: Tokens, n: int, position: Tensor) -> Tensor:
    """What the sum of a user's query is multiplied with; one number, or one per position."""
    if tokens.attn_scale is None:
        return 1.0 / tokens.norm[0 if case.norm == "one" else n].double()
    return tokens.attn_scale[n].double()[position] if case.attn_scale == "rows" else tokens.attn_scale[0].double()[0]


def _exact_bias(tokens: Tokens, n: int, prefix: int, position: Tensor) -> Tensor:
    times = tokens.timestamps[n]
    place = torch.arange(len(times), device=position.device).clamp(max=prefix)
    middle, last = (len(tokens.position_bias) - 1) // 2, len(tokens.position_bias) - 1
    index = (middle + place - place[position][:, None]).clamp(0, last)
    bucket = time_bucket(times[position][:, None] - times, len(tokens.time_bias) - 1)
    return tokens.position_bias[index].double() + tokens.time_bias[bucket].double()
