"""From embedding rows to the token stream: the preprocessor and the position and time encoder of DlrmHSTU.

Shape suffixes: T tokens, B users, C contextual slots, D model width, E table width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hstu_trt.contract.model import HstuConfig
from hstu_trt.export.layers import TokenLayout, mlp, users_of

SECONDS_PER_BUCKET_UNIT = 60.0
MIN_ELAPSED_SECONDS = 1e-6


class ActionEncoder(nn.Module):
    """Action bit masks -> one learned vector per action type that is set, side by side."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        assert config.action_weights is not None
        self.weights = config.action_weights
        actions = len(self.weights)
        self._action_embedding_table = nn.Parameter(torch.zeros(actions, config.action_dim))
        self._target_action_embedding_table = nn.Parameter(torch.zeros(1, actions * config.action_dim))
        self.register_buffer("_combined_action_weights", torch.tensor(self.weights))

    def forward(self, actions_T: Tensor) -> Tensor:
        """History: int64 [T] -> [T, actions * action_dim]."""
        taken = torch.stack([self._has_any_bit(actions_T, weight) for weight in self.weights], dim=1)
        table = self._action_embedding_table
        return (taken[:, :, None].to(table.dtype) * table).reshape(-1, table.numel())

    def _has_any_bit(self, actions_T: Tensor, weight: int) -> Tensor:
        """``(action & weight) > 0``; by remainders, since TensorRT has no bitwise operators on integers."""
        bits = [1 << n for n in range(weight.bit_length()) if weight >> n & 1]
        present = [actions_T.remainder(2 * bit) >= bit for bit in bits]
        return torch.stack(present).any(dim=0) if len(present) > 1 else present[0]

    def candidates(self, tokens: int) -> Tensor:
        """Candidates have no action yet: the same learned vector for each, [T, actions * action_dim]."""
        return self._target_action_embedding_table.expand(tokens, -1)


class Preprocessor(nn.Module):
    """Content, additional and action embeddings of history and candidates, and the contextual tokens."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        e, p, d = config.embedding_dim, config.preprocessor_dim, config.model_dim
        slots, additional = len(config.contextual_slots), len(config.additional_features)
        if slots:
            self._batched_contextual_linear_weights = nn.Parameter(torch.zeros(slots, e, d))
            self._batched_contextual_linear_bias = nn.Parameter(torch.zeros(slots, d))
        self._content_embedding_mlp = mlp(e, p, d)
        # Always in the checkpoint; without additional features its first weight is [P, 0] and it is never called.
        self._additional_embedding_mlp = mlp(e * additional, p, d)
        if config.action_weights is not None:
            self._action_encoder = ActionEncoder(config)
            self._action_embedding_mlp = mlp(len(config.action_weights) * config.action_dim, p, d)

    def forward(self, inputs: Mapping[str, Tensor], layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """Returns the prefix tokens [Tp, D] and the candidate tokens [Tc, D]."""
        uih, candidates = inputs["uih_embeddings"], inputs["candidate_embeddings"]
        history = self._content_embedding_mlp(self._columns(uih, self.config.uih_features[:1], of_candidates=False))
        items = self._content_embedding_mlp(self._columns(candidates, self.config.uih_features[:1], of_candidates=True))
        if self.config.additional_features:
            additional = self.config.additional_features
            history = history + self._additional_embedding_mlp(self._columns(uih, additional, of_candidates=False))
            items = items + self._additional_embedding_mlp(self._columns(candidates, additional, of_candidates=True))
        if self.config.action_weights is not None:
            encode = self._action_encoder
            history = history + self._action_embedding_mlp(encode(inputs["uih_actions"]))
            items = items + self._action_embedding_mlp(encode.candidates(items.shape[0]))
        history, items = history.to(uih.dtype), items.to(uih.dtype)
        if self.config.contextual_slots:
            contextual = self._contextual(inputs["contextual_embeddings"], layout)
            history = prepend_contextual(contextual, history, layout)
        return history, items

    def _columns(self, rows: Tensor, features: tuple[str, ...], *, of_candidates: bool) -> Tensor:
        """The columns of some history features, or of their candidate partners."""
        e = self.config.embedding_dim
        names = self.config.candidate_features if of_candidates else self.config.uih_features
        wanted = [self.config.uih_partner[f] for f in features] if of_candidates else list(features)
        parts = [rows[:, names.index(name) * e : (names.index(name) + 1) * e] for name in wanted]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _contextual(self, rows_BCE: Tensor, layout: TokenLayout) -> Tensor:
        """Contextual tokens [B, C, D]: rows zeroed for short sequences, then one linear per slot, with its bias."""
        slots = len(self.config.contextual_slots)
        minimum = [f.min_sequence for f in self.config.contextual_features for _ in range(f.slots)]
        # The reference counts history plus candidates here, without the contextual tokens themselves.
        sequence_B = layout.prefix_lengths - slots + layout.candidate_lengths
        long_enough = sequence_B[:, None] >= torch.tensor(minimum, device=rows_BCE.device)
        rows = rows_BCE.reshape(-1, slots, self.config.embedding_dim) * long_enough[:, :, None].to(rows_BCE.dtype)
        linear = torch.matmul(rows.transpose(0, 1), self._batched_contextual_linear_weights)
        return linear.transpose(0, 1) + self._batched_contextual_linear_bias


def prepend_contextual(contextual_BCD: Tensor, history_TD: Tensor, layout: TokenLayout) -> Tensor:
    """Puts each user's contextual tokens in front of their history: prefix tokens [B*C + T, D]."""
    users, slots, width = contextual_BCD.shape
    tokens = history_TD.shape[0] + users * slots
    user = users_of(layout.prefix_offsets, tokens)
    index = torch.arange(tokens, device=history_TD.device)
    local = index - layout.prefix_offsets[user]
    contextual_row = user * slots + local
    # History row t of user b is prefix token t + slots * (b + 1), and stands behind all contextual rows in the source.
    history_row = users * slots + index - (user + 1) * slots
    source = torch.cat([contextual_BCD.reshape(-1, width), history_TD])
    return source[torch.where(local < slots, contextual_row, history_row)]


class PositionalEncoder(nn.Module):
    """Adds a position and a time-bucket embedding to the tokens (the reference's ops/pytorch/pt_position.py)."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.slots = len(config.contextual_slots)
        self.scale = math.sqrt(config.model_dim)
        self._position_embeddings_weight = nn.Parameter(torch.zeros(config.position_buckets, config.model_dim))
        self._timestamp_embeddings_weight = nn.Parameter(torch.zeros(config.time_buckets + 1, config.model_dim))
        self.last_position = config.position_buckets - 1
        self.last_bucket = config.time_buckets if config.time_bucket_clamp == "rows" else config.model_dim - 1

    def forward(
        self, prefix_TD: Tensor, items_TD: Tensor, inputs: Mapping[str, Tensor], layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """Encodes prefix and candidate tokens; both keep their shapes."""
        user_P = users_of(layout.prefix_offsets, prefix_TD.shape[0])
        user_C = users_of(layout.candidate_offsets, items_TD.shape[0])
        query_time_B = inputs["candidate_timestamps"][(layout.candidate_offsets[1:] - 1).clamp(min=0).long()]
        prefix_times = self._prefix_timestamps(inputs["uih_timestamps"], user_P, layout)
        prefix_time = self._time(query_time_B[user_P] - prefix_times)
        item_time = self._time(query_time_B[user_C] - inputs["candidate_timestamps"])
        # Every candidate stands right behind the newest event, at position `slots`.
        item_position = self._position_embeddings_weight[self.slots]
        prefix = self._add(prefix_TD, self._prefix_positions(user_P, layout), prefix_time)
        return prefix, self._add(items_TD, item_position, item_time)

    def _add(self, x_TD: Tensor, position: Tensor, time: Tensor) -> Tensor:
        return x_TD * self.scale + (position + time).to(x_TD.dtype)

    def _prefix_positions(self, user_T: Tensor, layout: TokenLayout) -> Tensor:
        """Positions count back from the newest event: it has slots + 1; contextual token j has j."""
        local = torch.arange(user_T.shape[0], device=user_T.device) - layout.prefix_offsets[user_T]
        from_newest = layout.prefix_lengths[user_T] - local + self.slots
        position = torch.where(local < self.slots, local, from_newest)
        return self._position_embeddings_weight[position.clamp(0, self.last_position).long()]

    def _prefix_timestamps(self, uih_timestamps_T: Tensor, user_T: Tensor, layout: TokenLayout) -> Tensor:
        """Timestamps of the prefix tokens [Tp]: contextual tokens have 0."""
        if not self.slots:
            return uih_timestamps_T
        users = layout.prefix_offsets.shape[0] - 1
        zeros = uih_timestamps_T.new_zeros(users, self.slots, 1)
        return prepend_contextual(zeros, uih_timestamps_T[:, None], layout)[:, 0]

    def _time(self, elapsed_T: Tensor) -> Tensor:
        """Bucket trunc(sqrt(minutes)) of int64 seconds; the difference is exact before it becomes fp32."""
        minutes = elapsed_T.float().clamp(min=MIN_ELAPSED_SECONDS) / SECONDS_PER_BUCKET_UNIT
        bucket = minutes.sqrt().long().clamp(0, self.last_bucket)
        return self._timestamp_embeddings_weight[bucket]


def full_layout(inputs: Mapping[str, Tensor], slots: int) -> TokenLayout:
    """The layout of a request: prefixes are histories with ``slots`` contextual tokens in front."""
    offsets = inputs["uih_offsets"]
    users = torch.arange(offsets.shape[0], device=offsets.device, dtype=torch.int32)
    return TokenLayout(offsets + users * slots if slots else offsets, inputs["candidate_offsets"])
