"""Requests to calibrate fp8 with: from a file of jagged features, or made up for a config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.features import Jagged, Tensors, batch_max_norm, jagged_features, pack_request, request_features
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.tensors import Limits
from hstu_trt.contract.text import number_in
from hstu_trt.export.model import DlrmHstu
from hstu_trt.export.quantise import Largest, calibrate
from hstu_trt.export.stages import EmbeddingStage

SYNTHETIC = "synthetic"
DEFAULT_REQUESTS = 32
# Of made-up requests: enough for the largest values to settle, and little enough for a CPU.
_MOST_EVENTS, _MOST_CANDIDATES = 1024, 64
_NOW, _HOUR = 1_760_000_000, 3600
_SEED = 8


def calibration_requests(config: HstuConfig, limits: Limits, source: str) -> Tensors:
    """A packed request of several users (``pack_request``) from ``FILE`` or ``synthetic:N``.

    FILE: safetensors with ``uih.<feature>.values|lengths`` and ``cand.<feature>.values|lengths``, as
    ``hstu-trt score`` takes. Raises InputError or ConfigError.
    """
    kind, _, count = source.partition(":")
    if kind != SYNTHETIC:
        return _from_file(config, Path(source))
    requests = number_in(count)
    if not requests:
        raise ConfigError(f"calibration {source}: expected a FILE or {SYNTHETIC}:<requests>")
    return synthetic_requests(config, limits, requests)


def _from_file(config: HstuConfig, path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
        used = request_features(config)
        packed = pack_request(config, jagged_features(tensors, "uih", used), jagged_features(tensors, "cand", used))
    except (OSError, SafetensorError, InputError) as error:
        raise InputError(f"calibration {path}: {error}") from None
    if np.diff(packed["candidate_offsets"]).min(initial=1) < 1 or not packed["candidate_ids"].size:
        raise InputError(f"calibration {path}: every user needs a candidate")
    return packed


def synthetic_requests(config: HstuConfig, limits: Limits, requests: int) -> Tensors:
    """Seeded requests with uniform ids: histories from none to the limit (at most 1,024 events), evenly in log length.

    Real requests are better: their popular ids, actions and gaps between events are those that the model will see.
    """
    rng = np.random.default_rng(_SEED)
    longest = min(limits.history, _MOST_EVENTS)
    history = np.geomspace(1, longest + 1, requests).astype(np.int64) - 1
    candidates = np.full(requests, min(limits.candidates, _MOST_CANDIDATES))
    tokens, rows = int(history.sum()), int(candidates.sum())

    def ids(feature: str, count: int) -> NDArray:
        return rng.integers(0, config.table_of(feature).rows, count)

    asked = _NOW + rng.integers(0, 7 * 24 * _HOUR, requests)
    users = np.repeat(np.arange(requests), history)
    position_from_end = np.repeat(np.cumsum(history), history) - np.arange(tokens)
    uih = {name: Jagged(ids(name, tokens), history) for name in config.uih_features}
    uih[config.action_time_feature] = Jagged(asked[users] - position_from_end * _HOUR, history)
    if config.action_weights is not None and config.action_weight_feature is not None:
        uih[config.action_weight_feature] = Jagged(rng.choice(np.array(config.action_weights), tokens), history)
    for slot in config.contextual_features:
        uih[slot.name] = Jagged(ids(slot.name, requests * slot.slots), np.full(requests, slot.slots))
    items = {name: Jagged(ids(name, rows), candidates) for name in config.candidate_features}
    items[config.query_time_feature] = Jagged(np.repeat(asked, candidates), candidates)
    return pack_request(config, uih, items)


def requests_with_norm(config: HstuConfig, packed: Mapping[str, NDArray], norm: float | None) -> Tensors:
    """The packed request with ``attention_norm``; None is the longest sequence of the batch."""
    value = batch_max_norm(config, packed) if norm is None else norm
    return {**packed, "attention_norm": np.array([value], dtype=np.float32)}


def scores(model: DlrmHstu, lookup: EmbeddingStage, feeds: Iterable[Mapping[str, NDArray]]) -> Iterator[Tensor]:
    """Runs an fp32 model on packed requests with their norm: scores fp32 [candidates, tasks] of each."""
    for feed in feeds:
        inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feed.items()}
        rows = lookup.look_up(inputs)
        vectors = model.hstu_stage({**inputs, **rows})
        yield model.head_stage({**rows, "user_embeddings": vectors})


def largest_values(model: DlrmHstu, lookup: EmbeddingStage, feeds: Iterable[Mapping[str, NDArray]]) -> Largest:
    """``calibrate`` on packed requests. Raises InputError where a value is not finite."""
    largest = calibrate(model, lambda: [None for _ in scores(model, lookup, feeds)])
    for name, value in largest.items():
        if not value.isfinite().all():
            raise InputError(f"calibration: the input of {name} is not finite; check the weights and the requests")
    return largest
