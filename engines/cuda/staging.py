"""The bytes that go to the GPU for a batch: one buffer, one copy, and the tensors in it by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.tensors import PADDING_ID
from hstu_trt.engines.cuda.fused_batch import FusedInputs, tower_features
from hstu_trt.engines.cuda.packing import Bucket, Size

_ALIGNMENT = 256
_TORCH = {"int64": torch.int64, "int32": torch.int32, "float32": torch.float32}

UserFeed = Mapping[str, NDArray]
"""Inputs of the ``ranking_fused`` stage for one user."""


@dataclass(frozen=True)
class _Field:
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class StagingLayout:
    """Where the tensors of ``FusedInputs`` stand in the buffer of a bucket."""

    def __init__(self, config: HstuConfig, bucket: Bucket) -> None:
        self.bucket = bucket
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "token_ids": ("int64", (len(config.uih_features), bucket.tokens)),
            "tower_ids": ("int64", (len(tower_features(config)), bucket.candidates)),
            "contextual_ids": ("int64", (len(config.contextual_slots), bucket.users)),
            "actions": ("int64", (bucket.tokens if config.action_weights else 0,)),
            "timestamps": ("int64", (bucket.tokens,)),
            "prefix_offsets": ("int32", (bucket.users + 1,)),
            "candidate_offsets": ("int32", (bucket.users + 1,)),
            "norm": ("float32", (bucket.users,)),
        }
        self._fields: dict[str, _Field] = {}
        end = 0
        for name, (dtype, shape) in shapes.items():
            self._fields[name] = _Field(dtype, shape, end)
            end += -(-self._fields[name].bytes // _ALIGNMENT) * _ALIGNMENT
        self.bytes = end

    def arrays(self, buffer: Tensor) -> dict[str, NDArray]:
        """The tensors in a buffer of host memory, uint8, as numpy arrays that write to it."""
        whole = buffer.numpy()
        return {
            name: whole[field.begin : field.begin + field.bytes].view(field.dtype).reshape(field.shape)
            for name, field in self._fields.items()
        }

    def inputs(self, buffer: Tensor) -> FusedInputs:
        """The tensors in a buffer, uint8."""
        tensors: dict[str, Any] = {
            name: buffer[field.begin : field.begin + field.bytes].view(_TORCH[field.dtype]).view(field.shape)
            for name, field in self._fields.items()
        }
        return FusedInputs(**tensors, prefix_tokens=self.bucket.prefix)


def size_of(config: HstuConfig, feed: UserFeed) -> Size:
    """Tokens of a user's feed."""
    return Size(len(feed["uih_timestamps"]) + len(config.contextual_slots), len(feed["candidate_timestamps"]))


class Writer:
    """Lays out feeds in the arrays of a bucket."""

    def __init__(self, config: HstuConfig) -> None:
        self._slots = len(config.contextual_slots)
        self._least = np.array([f.min_sequence for f in config.contextual_features for _ in range(f.slots)])
        columns = config.candidate_features
        self._history_width, self._candidate_width = len(config.uih_features), len(columns)
        self._partners = [columns.index(config.uih_partner[name]) for name in config.uih_features]
        self._tower = [columns.index(name) for name in tower_features(config)]
        self._actions = config.action_weights is not None

    def write(self, arrays: Mapping[str, NDArray], bucket: Bucket, feeds: Sequence[UserFeed]) -> None:
        """Fills every element that the kernels read; rows that no feed needs go to the filler, the last user."""
        prefix, candidate = 0, 0
        prefixes, candidates = arrays["prefix_offsets"], arrays["candidate_offsets"]
        prefixes[0] = candidates[0] = 0
        arrays["contextual_ids"][:, len(feeds) :] = PADDING_ID
        arrays["norm"][len(feeds) :] = 1.0
        for user, feed in enumerate(feeds):
            self._write_user(arrays, bucket, user, feed, (prefix, candidate))
            prefix += self._slots + len(feed["uih_timestamps"])
            candidate += len(feed["candidate_timestamps"])
            prefixes[user + 1], candidates[user + 1] = prefix, candidate
        prefixes[len(feeds) + 1 :], candidates[len(feeds) + 1 :] = prefix, candidate
        prefixes[-1], candidates[-1] = bucket.prefix, bucket.candidates
        for rows in (slice(prefix, bucket.prefix), slice(bucket.prefix + candidate, None)):
            arrays["token_ids"][:, rows] = PADDING_ID
            arrays["timestamps"][rows] = 0
            if self._actions:
                arrays["actions"][rows] = 0
        arrays["tower_ids"][:, candidate:] = PADDING_ID

    def _write_user(
        self, arrays: Mapping[str, NDArray], bucket: Bucket, user: int, feed: UserFeed, begin: tuple[int, int]
    ) -> None:
        history, count = len(feed["uih_timestamps"]), len(feed["candidate_timestamps"])
        first = begin[0] + self._slots
        contextual, past = slice(begin[0], first), slice(first, first + history)
        items = slice(bucket.prefix + begin[1], bucket.prefix + begin[1] + count)
        ids, candidates = arrays["token_ids"], feed["candidate_ids"].reshape(count, self._candidate_width)
        ids[:, contextual] = PADDING_ID
        ids[:, past] = feed["uih_ids"].reshape(history, self._history_width).T
        for row, column in enumerate(self._partners):
            ids[row, items] = candidates[:, column]
        for row, column in enumerate(self._tower):
            arrays["tower_ids"][row, begin[1] : begin[1] + count] = candidates[:, column]
        times = arrays["timestamps"]
        times[contextual] = 0
        times[past], times[items] = feed["uih_timestamps"], feed["candidate_timestamps"]
        if self._actions:
            arrays["actions"][past] = feed["uih_actions"]
        if self._slots:
            # The reference takes the contextual rows of short sequences away; history and candidates count.
            known = history + count >= self._least
            arrays["contextual_ids"][:, user] = np.where(known, feed["contextual_ids"].reshape(-1), PADDING_ID)
        arrays["norm"][user] = feed["attention_norm"][0]
