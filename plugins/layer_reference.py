"""The layer kernels in plain PyTorch: what they are tested against, and what runs where there is no GPU.

Sums, norms and activations are computed in fp32 and rounded once, as in the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hstu_trt.plugins.layer_calls import Norm, TokenInputs, TokenWeights, VectorWeights

E4M3_MAX = 448.0
L2_EPS = 1e-6
SECONDS_PER_UNIT = 60.0
LEAST_ELAPSED = 1e-6
# The reference's circle: 2 * 3.14, not 2 * pi.
FULL_CIRCLE = 2 * 3.14


def stored(values: Tensor, dtype: torch.dtype, scale: float | None) -> Tensor:
    """fp32 values in ``dtype``, or in e4m3 with a scale."""
    if scale is None:
        return values.to(dtype)
    return (values / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """fp32."""
    return functional.layer_norm(x.float(), x.shape[-1:], norm.gain, norm.bias, norm.eps)


def norm_rows(
    x: Tensor, norm: Norm, *, delta: Tensor | None, swish: bool, factor: Tensor | None, scale: float | None
) -> Tensor:
    """See ``layer.norm_rows``."""
    if delta is not None:
        x.copy_(x.float() + delta.float())
    y = layer_norm(x, norm)
    if swish:
        y = x.float() * torch.sigmoid(y)
    if factor is not None:
        y = y * factor.float()
    return stored(y, x.dtype, scale)


def gate(
    u: Tensor, attention: Tensor, norm: Norm, joined: Tensor, *, heads: int, group_norm: bool, scale: float | None
) -> None:
    """See ``layer.gate``."""
    width = u.shape[1]
    gated = functional.silu(u.float())
    values = attention.float()
    if group_norm:
        by_head = functional.layer_norm(values.reshape(-1, heads, width // heads), (width // heads,), eps=norm.eps)
        normed = (by_head * norm.gain[:, None] + norm.bias[:, None]).reshape(-1, width)
    else:
        normed = layer_norm(attention, norm)
    thirds = (gated, values, gated * normed)
    for third, part in enumerate(thirds):
        joined[:, third * width : (third + 1) * width] = stored(part, u.dtype, scale)


def project(
    x: Tensor, weight: Tensor, column_scale: Tensor, bias: Tensor, outputs: Sequence[tuple[int, float | None]]
) -> list[Tensor]:
    """See ``layer.project``."""
    values = (x.float() @ weight.float().t()) * column_scale + bias
    parts = values.split([width for width, _ in outputs], dim=1)
    return [stored(part, torch.float16, scale) for part, (_, scale) in zip(parts, outputs, strict=True)]


def users_of(offsets: Tensor, rows: int) -> Tensor:
    """The user of each of ``rows`` packed rows, int64."""
    index = torch.arange(rows, device=offsets.device)
    return torch.searchsorted(offsets[1:].long().contiguous(), index, right=True)


def encode_tokens(weights: TokenWeights, inputs: TokenInputs, norm: Norm, scale: float | None) -> tuple[Tensor, Tensor]:
    """See ``layer.encode_tokens``."""
    prefix, tokens = inputs.prefix_tokens, inputs.content.shape[0]
    x = layer_norm(inputs.content, weights.content_norm)
    if inputs.extra is not None:
        rows, index = inputs.extra.rows.float(), inputs.extra.index
        if index is not None:
            last = rows.shape[0] - 1
            rows = rows[torch.where((index < 0) | (index > last), last, index)]
        x = x + rows[:tokens]
    if weights.actions_table is not None:
        x = x + weights.actions_table.float()[_action_rows(weights, inputs)]
    user = users_of(inputs.prefix_offsets, prefix)
    local = torch.arange(prefix, device=x.device) - inputs.prefix_offsets[user]
    if weights.slots:
        assert inputs.contextual is not None
        first = local < weights.slots
        x[:prefix][first] = inputs.contextual.float()[user[first] * weights.slots + local[first]]
    x = x * math.sqrt(x.shape[1])
    lengths = inputs.prefix_offsets.diff()[user]
    position = torch.where(local < weights.slots, local, lengths - local + weights.slots)
    position = torch.cat([position, position.new_full((tokens - prefix,), weights.slots)])
    x = x + weights.position_table.float()[position.clamp(0, weights.position_table.shape[0] - 1)]
    x = (x + weights.time_table.float()[_buckets(weights, inputs, user)]).to(inputs.content.dtype)
    return x, stored(layer_norm(x, norm), x.dtype, scale)


def _action_rows(weights: TokenWeights, inputs: TokenInputs) -> Tensor:
    assert inputs.actions is not None
    rows = torch.zeros_like(inputs.actions)
    for bit, mask in enumerate(weights.action_masks):
        rows |= ((inputs.actions & mask) > 0).long() << bit
    rows[inputs.prefix_tokens :] = 1 << len(weights.action_masks)
    return rows


def _buckets(weights: TokenWeights, inputs: TokenInputs, prefix_users: Tensor) -> Tensor:
    prefix, times = inputs.prefix_tokens, inputs.timestamps
    candidate_users = users_of(inputs.candidate_offsets, times.shape[0] - prefix)
    last = (inputs.candidate_offsets[1:].long() - 1).clamp(min=0) + prefix
    asked = times[last.clamp(max=times.shape[0] - 1)]
    elapsed = asked[torch.cat([prefix_users, candidate_users])] - times
    minutes = elapsed.float().clamp(min=LEAST_ELAPSED) / SECONDS_PER_UNIT
    return minutes.sqrt().long().clamp(0, weights.time_table.shape[0] - 1)


def user_vectors(weights: VectorWeights, x: Tensor, timestamps: Tensor | None) -> Tensor:
    """See ``layer.user_vectors``; without the items."""
    values = x.float()
    if weights.kind == "l2_norm":
        length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        return (values / length.clamp(min=L2_EPS)).to(x.dtype)
    if weights.kind == "timestamp":
        assert timestamps is not None and weights.time_weight is not None
        values = values + time_features(timestamps) @ weights.time_weight
    assert weights.norm is not None
    return layer_norm(values, weights.norm).to(x.dtype)


def time_features(timestamps: Tensor) -> Tensor:
    """fp32 [T, 4]: cos and sin of the hour in the day, then of the day in the week, from fp32 seconds."""
    seconds = timestamps.float()
    features = []
    for unit, per_period in ((3600, 24), (86400, 7)):
        whole = seconds - seconds.long().remainder(unit).float()
        units = (whole / unit).round().long()
        angle = units.remainder(per_period).float() / per_period * FULL_CIRCLE
        features += [angle.cos(), angle.sin()]
    return torch.stack(features, dim=1)


def scores(hidden: Tensor, norm: Norm, weight: Tensor, bias: Tensor, *, binary: int) -> Tensor:
    """See ``layer.scores``."""
    values = hidden.float() * torch.sigmoid(layer_norm(hidden, norm))
    logits = values @ weight.t() + bias
    return torch.cat([torch.sigmoid(logits[:, :binary]), logits[:, binary:]], dim=1)
