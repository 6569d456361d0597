"""Requests to compare runners on: generated, or read from a file, and cut into batches that a deployment accepts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.score import pack_file
from hstu_trt.bench.workloads.generate import generate
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.workload import Workload
from hstu_trt.contract.features import Tensors, offsets_of, pack_request
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.split_users import one_user_feeds
from hstu_trt.contract.tensors import Limits

_USERS_PER_BATCH = 8


class Lengths(Protocol):
    """History events and candidates of each request, int64 [requests]."""

    @property
    def history_lengths(self) -> NDArray: ...

    @property
    def candidate_counts(self) -> NDArray: ...


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests of one user each, every one with a candidate."""

    source: str
    """Where they come from, for people."""
    history_lengths: NDArray
    candidate_counts: NDArray
    pack: Callable[[Sequence[int]], Tensors]
    """Rows -> one batch, the inputs of the ``ranking`` stage."""

    def __len__(self) -> int:
        return len(self.history_lengths)

    @property
    def candidate_offsets(self) -> NDArray:
        """Where each request's candidates begin among all, int64 [requests + 1]."""
        return np.concatenate([[0], np.cumsum(self.candidate_counts)])

    def text(self, row: int) -> str:
        """Names a request for people."""
        return f"request {row} ({self.history_lengths[row]} events, {self.candidate_counts[row]} candidates)"


def read_requests(path: Path, config: HstuConfig) -> Requests:
    """Requests of a workload (.npz or a folder of them), or of the users of a .safetensors file of features.

    Users without a candidate are left out: there is nothing to compare. Raises InputError.
    """
    if path.suffix == ".safetensors":
        return _of_packed(pack_file(config, path), str(path))
    return _of_workload(Workload.load(path), config, str(path))


def generate_requests(model: ModelFolder, *, profile: str, count: int | None, seed: int) -> Requests:
    """Requests of a profile within the model's limits; at most ``count``, None leaves it to the profile."""
    chosen = PROFILES[profile]()
    if count is not None:
        chosen = dataclasses.replace(chosen, requests=count)
    config = model.ranking_config
    workload = generate(chosen, config, seed=seed, limits=model.limits)
    return _of_workload(workload, config, f"profile {profile}, seed {seed}")


def _of_workload(workload: Workload, config: HstuConfig, source: str) -> Requests:
    workload = workload.take(np.flatnonzero(workload.candidate_counts))
    return Requests(
        source=source,
        history_lengths=workload.history_lengths,
        candidate_counts=workload.candidate_counts,
        pack=lambda rows: pack_request(config, *workload.batch(config, rows)),
    )


def _of_packed(packed: Mapping[str, NDArray], source: str) -> Requests:
    users = [user for user in one_user_feeds(packed) if len(user["candidate_ids"])]
    return Requests(
        source=source,
        history_lengths=np.array([len(user["uih_ids"]) for user in users]),
        candidate_counts=np.array([len(user["candidate_ids"]) for user in users]),
        pack=lambda rows: _joined([users[row] for row in rows]),
    )


def _joined(users: Sequence[Tensors]) -> Tensors:
    """One-user requests as one batch."""
    batch = {name: np.concatenate([user[name] for user in users]) for name in users[0]}
    for name in ("uih_offsets", "candidate_offsets"):
        batch[name] = offsets_of(np.array([user[name][1] for user in users]))
    return batch


def user_batches(requests: Lengths, limits: Limits) -> Iterator[list[int]]:
    """Rows in order, as many at a time as the limits of a batch allow."""
    batch: list[int] = []
    history = candidates = 0
    for row, (events, items) in enumerate(zip(requests.history_lengths, requests.candidate_counts, strict=True)):
        full = history + events > limits.batch_history or candidates + items > limits.batch_candidates
        if batch and (full or len(batch) == min(_USERS_PER_BATCH, limits.users)):
            yield batch
            batch, history, candidates = [], 0, 0
        batch.append(row)
        history, candidates = history + int(events), candidates + int(items)
    if batch:
        yield batch
