"""Requests in the form of each served model, and scores back per user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Jagged, Tensors, pack_request
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.tensors import Limits
from hstu_trt.serving.signature import OFFSETS

Feature = Sequence[int] | NDArray


@dataclass(frozen=True, kw_only=True)
class RankRequest:
    """One user to rank candidates for. Values are ids, timestamps in seconds, or action bits."""

    user: Mapping[str, int | Feature]
    """Contextual feature -> id, or ids."""
    history: Mapping[str, Feature]
    """History feature -> a value per event, oldest first."""
    candidates: Mapping[str, Feature]
    """Candidate feature -> a value per candidate."""
    user_id: int | str | None = None
    """Whose requests a gateway sends to one replica; no part of what is scored."""


def pack(config: HstuConfig, requests: Sequence[RankRequest]) -> Tensors:
    """Several users as inputs of ``ranking``. Raises InputError naming the feature."""
    if not requests:
        raise InputError("no users to rank for: give at least one")
    contextual = [
        {name: [ids] if isinstance(ids, (int, np.integer)) else ids for name, ids in request.user.items()}
        for request in requests
    ]
    uih = _jagged([{**user, **request.history} for user, request in zip(contextual, requests, strict=True)])
    return pack_request(config, uih, _jagged([request.candidates for request in requests]))


def _jagged(users: Sequence[Mapping[str, Feature]]) -> dict[str, Jagged]:
    features = {}
    for name in users[0]:
        lacking = [index for index, user in enumerate(users) if name not in user]
        if lacking:
            raise InputError(f"feature {name!r} is given for user 0, but not for user {lacking[0]}")
        parts = [_integers(user[name], f"feature {name!r} of user {index}") for index, user in enumerate(users)]
        features[name] = Jagged.of(name, np.concatenate(parts), [part.size for part in parts])
    return features


def _integers(values: Feature, what: str) -> NDArray:
    """Values as int64 ``[n]``. Raises InputError."""
    try:
        array = np.asarray(values)
    except ValueError:  # rows of unequal lengths
        raise InputError(f"{what} must be a flat list of integers") from None
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(f"{what} must be a list of integers, got {array.dtype} of shape {list(array.shape)}")
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{what} holds {array.max()} at [{array.argmax()}], which is no int64")
    return array.astype(np.int64)


def one_user(packed: Tensors) -> Tensors:
    """The inputs of ``ranking`` for one user as inputs of ``ranking_fused``: flat, with a batch dim, no offsets."""
    return {name: array.reshape(1, -1) for name, array in packed.items() if name not in OFFSETS}


def sample(config: HstuConfig, limits: Limits, *, seed: int = 0) -> RankRequest:
    """A made-up request that the model of ``config`` can answer: 8 events and 5 candidates, or as many as it may."""
    random = np.random.default_rng(seed)
    events, items = min(8, limits.history), min(5, limits.candidates)
    now = 1_700_000_000

    def ids(feature: str, count: int) -> NDArray:
        return random.integers(0, max(1, config.table_of(feature).rows), count)

    history = {name: ids(name, events) for name in config.uih_features}
    history[config.action_time_feature] = now - 3600 * np.arange(events, 0, -1)
    if config.action_weights is not None and config.action_weight_feature is not None:
        history[config.action_weight_feature] = random.choice(config.action_weights, events)
    candidates = {name: ids(name, items) for name in config.candidate_features}
    candidates[config.query_time_feature] = np.full(items, now)
    user = {feature.name: ids(feature.name, feature.slots) for feature in config.contextual_features}
    return RankRequest(user=user, history=history, candidates=candidates)
