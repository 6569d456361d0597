"""From the feed of the ``hstu`` stage, which holds table rows, to a ``Batch``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.model import HstuConfig
from hstu_trt.engines.cuda.network import Batch, additional_rows
from hstu_trt.engines.cuda.weights import ModelWeights


def batch_of_rows(config: HstuConfig, weights: ModelWeights, feed: Mapping[str, Tensor], device: torch.device) -> Batch:
    """The batch of a checked feed of ``hstu``, whose tensors are on the host or the device."""
    history_offsets, candidate_offsets = (feed[f"{side}_offsets"].cpu().numpy() for side in ("uih", "candidate"))
    slots, users = len(config.contextual_slots), len(history_offsets) - 1
    prefix_offsets = (history_offsets + slots * np.arange(users + 1)).astype(np.int32)
    prefix, candidates = int(prefix_offsets[-1]), len(feed["candidate_timestamps"])
    # Row of each history event among the prefixes: behind the contextual tokens of its user and of those before.
    places = np.arange(int(history_offsets[-1])) + slots * (1 + np.repeat(np.arange(users), np.diff(history_offsets)))
    history = torch.from_numpy(places).to(device)

    def spread(past: Tensor, items: Tensor) -> Tensor:
        past, items = past.to(device), items.to(device)
        if not slots:
            return torch.cat([past, items])
        rows = past.new_zeros((prefix + candidates, *past.shape[1:]))
        rows.index_copy_(0, history, past)
        rows[prefix:] = items
        return rows

    e = config.embedding_dim
    columns = [config.candidate_features.index(config.uih_partner[name]) for name in config.uih_features]
    parts = feed["candidate_embeddings"].to(device).split(e, dim=1)
    rows = spread(feed["uih_embeddings"], torch.cat([parts[column] for column in columns], dim=1))
    actions, items = feed.get("uih_actions"), feed["candidate_timestamps"]
    lengths = np.diff(history_offsets) + np.diff(candidate_offsets)
    return Batch(
        content=rows[:, :e].contiguous(),
        extra=additional_rows(weights, rows[:, e:].contiguous()) if config.additional_features else None,
        contextual=_contextual(config, feed, lengths, device),
        actions=None if actions is None else spread(actions, torch.zeros_like(items)),
        timestamps=spread(feed["uih_timestamps"], items),
        prefix_offsets=torch.from_numpy(prefix_offsets).to(device),
        candidate_offsets=feed["candidate_offsets"].to(device),
        norm=feed["attention_norm"].to(device),
        prefix_tokens=prefix,
    )


def _contextual(
    config: HstuConfig, feed: Mapping[str, Tensor], lengths: NDArray, device: torch.device
) -> Tensor | None:
    """[B * slots, E]: the contextual rows, zeroed where history and candidates are too few for their feature."""
    if not config.contextual_slots:
        return None
    least = np.array([f.min_sequence for f in config.contextual_features for _ in range(f.slots)])
    known = torch.from_numpy(lengths[:, None] >= least).to(device)
    rows = feed["contextual_embeddings"].to(device).reshape(len(lengths), len(least), config.embedding_dim)
    return (rows * known[:, :, None].to(rows.dtype)).reshape(-1, config.embedding_dim)
