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


def batch_of_rows(
    config: HstuConfig, weights: ModelWeights, feed: Mapping[str, NDArray], device: torch.device
) -> Batch:
    """The batch of a checked feed of ``hstu``."""
    slots, users = len(config.contextual_slots), len(feed["uih_offsets"]) - 1
    prefix_offsets = (feed["uih_offsets"] + slots * np.arange(users + 1)).astype(np.int32)
    prefix, candidates = int(prefix_offsets[-1]), len(feed["candidate_timestamps"])
    # Row of each history event among the prefixes: behind the contextual tokens of its user and of those before.
    history = np.ones(prefix, dtype=bool)
    history[(prefix_offsets[:-1, None] + np.arange(slots)).reshape(-1)] = False

    def spread(past: NDArray, items: NDArray) -> Tensor:
        rows = np.zeros((prefix + candidates, *past.shape[1:]), dtype=past.dtype)
        rows[:prefix][history] = past
        rows[prefix:] = items
        return torch.from_numpy(rows).to(device)

    e = config.embedding_dim
    columns = [config.candidate_features.index(config.uih_partner[name]) for name in config.uih_features]
    items = feed["candidate_embeddings"].reshape(candidates, -1, e)[:, columns].reshape(candidates, -1)
    rows = spread(feed["uih_embeddings"], items)
    actions = feed.get("uih_actions")
    return Batch(
        content=rows[:, :e].contiguous(),
        extra=additional_rows(weights, rows[:, e:].contiguous()) if config.additional_features else None,
        contextual=_contextual(config, feed, device),
        actions=None if actions is None else spread(actions, np.zeros(candidates, dtype=actions.dtype)),
        timestamps=spread(feed["uih_timestamps"], feed["candidate_timestamps"]),
        prefix_offsets=torch.from_numpy(prefix_offsets).to(device),
        candidate_offsets=torch.from_numpy(np.ascontiguousarray(feed["candidate_offsets"])).to(device),
        norm=torch.from_numpy(np.ascontiguousarray(feed["attention_norm"])).to(device),
        prefix_tokens=prefix,
    )


def _contextual(config: HstuConfig, feed: Mapping[str, NDArray], device: torch.device) -> Tensor | None:
    """[B * slots, E]: the contextual rows, zeroed where history and candidates are too few for their feature."""
    if not config.contextual_slots:
        return None
    least = np.array([f.min_sequence for f in config.contextual_features for _ in range(f.slots)])
    lengths = np.diff(feed["uih_offsets"]) + np.diff(feed["candidate_offsets"])
    rows = feed["contextual_embeddings"].reshape(len(lengths), len(least), config.embedding_dim)
    kept = rows * (lengths[:, None] >= least)[:, :, None].astype(rows.dtype)
    return torch.from_numpy(kept.reshape(-1, config.embedding_dim)).to(device)
