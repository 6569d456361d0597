"""What the library does, in plain PyTorch: an AttentionCall in, its output written in place. Runs without a GPU."""

from __future__ import annotations

import torch
from attention_calls import packed_values
from torch import Tensor

from hstu_trt.export.attention import MaskOptions, RelativeBias, reference_attention
from hstu_trt.export.torch_ops import _per_query
from hstu_trt.plugins.parameters import VALUE_BLOCK_KEYS, AttentionCall, Cache, value_blocks


class StandIn:
    """A backend whose kernels are all the same, and right."""

    device = torch.device("cpu")

    def unsupported(self, call: AttentionCall, kernel: str, output: torch.dtype) -> str | None:
        return None

    def run(self, call: AttentionCall, kernel: str, out: Tensor) -> None:
        used = int(call.offsets.query[-1] + call.offsets.candidate[-1])
        out[:used] = attention(call)[:used].to(out.dtype)

    def pack(self, v: Tensor, prefix_offsets: Tensor, candidate_offsets: Tensor) -> Tensor:
        return packed_values(v, prefix_offsets, candidate_offsets)


def attention(call: AttentionCall) -> Tensor:
    """fp32 [Tq, H, Dv]. Caches are unpaged and put before the call's rows, e4m3 values are made real."""
    prefix, candidate = call.offsets.prefix.tolist(), call.offsets.candidate.tolist()
    sides = []
    for side, (rows, cached) in enumerate(_keys_and_values(call)):
        new = [rows[prefix[n] : prefix[n + 1]] for n in range(call.users)]
        both = [torch.cat(pair) for pair in zip(cached, new, strict=True)]
        every = torch.cat([*both, rows[prefix[-1] : prefix[-1] + candidate[-1]]]) if both else rows[:0]
        sides.append(every * call.scales[side + 1][:, None] if call.scales else every)
    q = call.q.float() * call.scales.q[:, None] if call.scales else call.q.float()
    whole = call.offsets.prefix + (call.cache.offsets if call.cache else 0)
    offsets = (call.offsets.query, whole, call.offsets.candidate)
    options = {name: value for name, value in vars(call.options).items() if name != "alpha"}
    scale = call.attn_scale
    if scale is None:
        scale = _per_query(1 / call.norm, call.offsets.query, call.offsets.candidate)
    scale = torch.cat([scale, scale.new_zeros(len(q) - len(scale))]) if len(scale) != 1 else scale
    bias = _bias(call)
    mask = MaskOptions(**options)
    return reference_attention(q, *sides, offsets, scale, alpha=call.options.alpha, mask=mask, bias=bias)


def _bias(call: AttentionCall) -> RelativeBias | None:
    if call.bias is None:
        return None
    position, time, query_timestamps, key_timestamps = call.bias
    return RelativeBias(
        position=position, time=time, query_timestamps=query_timestamps, key_timestamps=key_timestamps
    )  # fmt: skip


def _keys_and_values(call: AttentionCall) -> list[tuple[Tensor, list[Tensor]]]:
    """(rows of the call, cached rows per user) for k and for v, fp32."""
    v = call.v
    if call.packed_values:
        rows = call.k.shape[0]
        v = unpacked_values(v, rows, call.offsets.prefix, call.offsets.candidate)
    if call.cache is None:
        none = [torch.empty(0, *call.k.shape[1:])] * call.users, [torch.empty(0, *v.shape[1:])] * call.users
    else:
        none = _cached(call.cache, call.is_fp8)
    return [(call.k.float(), none[0]), (v.float(), none[1])]


def _cached(cache: Cache, is_fp8: bool) -> tuple[list[Tensor], list[Tensor]]:
    bounds = cache.offsets.tolist()
    users = len(bounds) - 1
    v = cache.v
    if cache.page_table is None:
        if is_fp8:
            v = unpacked_values(v, cache.k.shape[0], cache.offsets, torch.zeros_like(cache.offsets))
        return tuple([t[bounds[n] : bounds[n + 1]].float() for n in range(users)] for t in (cache.k, v))  # type: ignore[return-value]
    if is_fp8:
        v = torch.stack([_tokens_of_block(block) for block in v]) if len(v) else v
    chosen = [
        cache.page_table[n, : -(-(bounds[n + 1] - bounds[n]) // cache.k.shape[1])].long().tolist() for n in range(users)
    ]
    both = []
    for pages in (cache.k, v):
        rows = [torch.cat([pages[:0].float().flatten(0, 1), *(pages[p].float() for p in c)]) for c in chosen]
        both.append([rows[n][: bounds[n + 1] - bounds[n]] for n in range(users)])
    return both[0], both[1]


def _tokens_of_block(block: Tensor) -> Tensor:
    """[H, Dv, 128] as packed -> [128, H, Dv]."""
    tokens = torch.empty(VALUE_BLOCK_KEYS, *block.shape[:2], dtype=torch.uint8)
    for slot in range(VALUE_BLOCK_KEYS):
        t, i = divmod(slot % 16, 4)
        key = slot // 16 * 16 + (2 * t + i if i < 2 else 8 + 2 * t + i - 2)
        tokens[key] = block.view(torch.uint8)[..., slot]
    return tokens.view(block.dtype)


def unpacked_values(blocks: Tensor, rows: int, prefix_offsets: Tensor, candidate_offsets: Tensor) -> Tensor:
    """The inverse of ``pack_values``: value blocks -> [rows, H, Dv]."""
    users, behind = len(prefix_offsets) - 1, int(prefix_offsets[-1])
    out = torch.zeros(rows, *blocks.shape[1:3], dtype=torch.uint8)
    for section, (base, offsets) in enumerate(((0, prefix_offsets), (behind, candidate_offsets))):
        for n, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
            block = section * value_blocks(rows, users) + begin // VALUE_BLOCK_KEYS + n
            for row in range(begin, end, VALUE_BLOCK_KEYS):
                part = _tokens_of_block(blocks[block + (row - begin) // VALUE_BLOCK_KEYS])[: end - row]
                out[base + row : base + row + len(part)] = part.view(torch.uint8)
    return out.view(blocks.dtype)
