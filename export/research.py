"""The HSTU of the paper: a sequential recommender over the same attention op.

Follows research/modeling/sequential/hstu.py of the reference (``model.py`` names its repository and commit).

Attribute names are the checkpoint's keys, hence the leading underscores. Shape suffixes: T tokens, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hstu_trt.contract.model import ResearchHstuConfig
from hstu_trt.contract.tensors import StageSpec
from hstu_trt.export.layers import users_of
from hstu_trt.export.stages import Stage

ITEM_TABLE = "item_id"
PADDING_ITEM = 0
MASK_BUFFER = "_attn_mask"
ITEM_TABLE_KEY = "_embedding_module._item_emb.weight"


class RelativeBiasTables(nn.Module):
    """The bias tables of a layer: time buckets, and relative positions [2N-1]."""

    def __init__(self, config: ResearchHstuConfig) -> None:
        super().__init__()
        self._ts_w = nn.Parameter(torch.zeros(config.time_buckets + 1))
        self._pos_w = nn.Parameter(torch.zeros(2 * config.max_seq_len - 1))


class ResearchLayer(nn.Module):
    """One layer: norms without affine, SiLU on u, v, q and k, relative bias, no alpha."""

    def __init__(self, config: ResearchHstuConfig) -> None:
        super().__init__()
        self.config = config
        v_width, qk_width = config.heads * config.v_dim, config.heads * config.qk_dim
        self.widths = (v_width, v_width, qk_width, qk_width)
        self._uvqk = nn.Parameter(torch.zeros(config.model_dim, sum(self.widths)))
        self._rel_attn_bias = RelativeBiasTables(config)
        self._o = nn.Linear(v_width * (3 if config.concat_ua else 1), config.model_dim)

    def forward(self, x_TD: Tensor, offsets: Tensor, timestamps: tuple[Tensor, Tensor]) -> Tensor:
        normed = functional.layer_norm(x_TD, x_TD.shape[-1:], eps=self.config.eps)
        u, v, q, k = functional.silu(normed @ self._uvqk).split(self.widths, dim=1)
        attention = self._attend(q, k, v, offsets, timestamps).reshape(-1, self.widths[0])
        a = functional.layer_norm(attention, attention.shape[-1:], eps=self.config.eps)
        joined = torch.cat([u, a, u * a], dim=1) if self.config.concat_ua else u * a
        return self._o(joined) + x_TD

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, timestamps: tuple[Tensor, Tensor]) -> Tensor:
        heads = self.config.heads
        norm = torch.full((1,), float(self.config.max_seq_len), device=q.device)
        no_candidates = torch.zeros_like(offsets)
        return torch.ops.hstu_trt.attention(
            q.reshape(-1, heads, self.config.qk_dim),
            k.reshape(-1, heads, self.config.qk_dim),
            v.reshape(-1, heads, self.config.v_dim),
            offsets, offsets, no_candidates, norm, *[None] * 4,
            self._rel_attn_bias._pos_w, self._rel_attn_bias._ts_w, *timestamps,
            1.0, True, 0, 0, 0, 1, torch.float32,
        )  # fmt: skip


class _Layers(nn.Module):
    def __init__(self, config: ResearchHstuConfig) -> None:
        super().__init__()
        self._attention_layers = nn.ModuleList(ResearchLayer(config) for _ in range(config.layers))


class _InputPreprocessor(nn.Module):
    def __init__(self, config: ResearchHstuConfig) -> None:
        super().__init__()
        self._pos_emb = nn.Embedding(config.max_seq_len, config.model_dim)


class ResearchHstu(nn.Module):
    """Ids and timestamps of packed histories -> encoded tokens."""

    def __init__(self, config: ResearchHstuConfig) -> None:
        super().__init__()
        self.config = config
        self._input_features_preproc = _InputPreprocessor(config)
        self._hstu = _Layers(config)

    def forward(self, rows_TD: Tensor, ids_T: Tensor, offsets: Tensor, timestamps: tuple[Tensor, Tensor]) -> Tensor:
        """rows: item embeddings; timestamps: (of the next token, of the token) int64 seconds. Returns [T, D]."""
        user = users_of(offsets, ids_T.shape[0])
        position = torch.arange(ids_T.shape[0], device=ids_T.device) - offsets[user]
        x = rows_TD * math.sqrt(self.config.model_dim) + self._input_features_preproc._pos_emb.weight[position]
        x = x * (ids_T != PADDING_ITEM)[:, None].to(x.dtype)
        for layer in self._hstu._attention_layers:
            x = layer(x, offsets, timestamps)
        if self.config.postprocessor == "l2_norm":
            return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=self.config.eps)
        return functional.layer_norm(x, x.shape[-1:], eps=self.config.eps)


class SequenceEncoderStage(Stage):
    """The research model as one stage: every encoded token, and each user's last one."""

    def __init__(self, spec: StageSpec, model: ResearchHstu, item_table: Tensor) -> None:
        super().__init__(spec)
        self.model = model
        self.register_buffer(f"table_{ITEM_TABLE}", item_table, persistent=False)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = self.named(tensors)
        ids, offsets = inputs["uih_ids"], inputs["uih_offsets"]
        table = getattr(self, f"table_{ITEM_TABLE}")
        rows = torch.ops.hstu_trt.embedding_lookup(ids, table, ITEM_TABLE, torch.float32)
        encoded = self.model(rows, ids, offsets, (inputs["next_timestamps"], inputs["uih_timestamps"]))
        last = (offsets[1:].long() - 1).clamp(min=0)
        return encoded, encoded[last]
