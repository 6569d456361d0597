"""What the Triton models compute, free of Triton: tensors by name in, tensors by name out, InputError on bad ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Tensors, check_request, offsets_of
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.runner import Runner
from hstu_trt.contract.tensors import ENSEMBLE, StageSpec, feature_columns
from hstu_trt.serving.models.table_ids import TableIds
from hstu_trt.serving.signature import ATTENTION_NORM, OFFSETS
from hstu_trt.tables.ids import Policy
from hstu_trt.tables.remote_resp import RemoteError

RequestError = InputError | RemoteError
"""Why one request has no answer: it is wrong, or rows that it needs are out of reach."""


class Stage(Protocol):
    """A stage as served: takes what a request holds, and checks it."""

    def infer(self, tensors: Mapping[str, NDArray]) -> Tensors: ...


class RunnerStage:
    """``hstu`` or ``mlp_head``: adds the deployment's attention norm and runs the engine, which checks the tensors."""

    def __init__(self, runner: Runner, attention_norm: float | None) -> None:
        self._runner = runner
        self._constants: Tensors = {}
        if attention_norm is not None:
            self._constants[ATTENTION_NORM] = np.asarray([attention_norm], dtype=np.float32)

    def infer(self, tensors: Mapping[str, NDArray]) -> Tensors:
        return self._runner.infer({**tensors, **self._constants})


class Lookup(Protocol):
    """``embedding_lookup``: ``HostLookup``, or ``LiveLookup`` over what is in use."""

    spec: StageSpec

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors: ...


class GuardedLookup:
    """``embedding_lookup`` in front of TensorRT plans, which check nothing: it sees, and checks, the whole request.

    Hands the deployment's attention norm on, since a plan takes it as an input.
    """

    def __init__(self, model: ModelFolder, lookup: Lookup, attention_norm: float) -> None:
        self._spec, self._limits, self._lookup = model.specs[ENSEMBLE], model.limits, lookup
        self._norm = np.asarray([attention_norm], dtype=np.float32)

    def infer(self, tensors: Mapping[str, NDArray]) -> Tensors:
        check_request(tensors, self._spec, self._limits)
        rows = self._lookup.infer({spec.name: tensors[spec.name] for spec in self._lookup.spec.inputs})
        return {**rows, ATTENTION_NORM: self._norm}


class FusedStage:
    """``ranking_fused`` as one engine, ids -> scores, whose tables are its own and fixed.

    A request holds one row per user: ``uih_ids [users, history * features]`` and so on, without offsets. The users of
    several requests are joined into batches within the limits.
    """

    def __init__(self, model: ModelFolder, runner: Runner, attention_norm: float, id_policy: Policy) -> None:
        self._users = UserBatches(model)
        self._ids = TableIds(model, id_policy)
        self._runner = runner
        self._norm = np.asarray([attention_norm], dtype=np.float32)

    @property
    def bad_ids(self) -> Counter[str]:
        """Ids outside each table so far."""
        return self._ids.bad

    def infer_many(self, requests: Sequence[Mapping[str, NDArray]]) -> list[NDArray | RequestError]:
        """Scores ``[users, candidates, tasks]`` per request, or what is wrong with that request."""
        packed = each(self._pack, requests)
        scores = iter(self._users.score([item for item in packed if not isinstance(item, RequestError)], self._score))
        return [item if isinstance(item, RequestError) else next(scores) for item in packed]

    def _pack(self, request: Mapping[str, NDArray]) -> Tensors:
        """One request as checked inputs of the ``ranking`` stage, ids outside the tables already dealt with."""
        tensors = self._users.pack(request)
        return tensors | self._ids.checked(tensors)

    def row_status(self, request: Mapping[str, NDArray]) -> list[NDArray]:
        """Status of the ids of a request that was answered (``TableIds.status``)."""
        return self._ids.status(request)

    def _score(self, feed: Tensors) -> NDArray:
        flat = {f"{group}_ids": feed[f"{group}_ids"].reshape(-1) for group in ("uih", "candidate")}
        return self._runner.infer(feed | flat | {ATTENTION_NORM: self._norm})["preds"]


T = TypeVar("T")


def each(
    function: Callable[[Mapping[str, NDArray]], T], requests: Iterable[Mapping[str, NDArray]]
) -> list[T | RequestError]:
    """The function's result per request, or what is wrong with that request."""
    results: list[T | RequestError] = []
    for request in requests:
        try:
            results.append(function(request))
        except (InputError, RemoteError) as error:
            results.append(error)
    return results


class UserBatches:
    """Requests that hold one row per user: packed, joined into batches within the limits, and their scores split."""

    def __init__(self, model: ModelFolder) -> None:
        self._spec = model.specs[ENSEMBLE]
        self._limits = model.limits
        self._columns = feature_columns(model.ranking_config)

    def pack(self, request: Mapping[str, NDArray]) -> Tensors:
        """One request as checked inputs of the ``ranking`` stage, but for its ids. Raises InputError."""
        tensors = {name: array for name, array in request.items() if name == "contextual_ids"}
        for name, array in request.items():
            if name == "contextual_ids":
                continue
            like, is_ids = f"{name.partition('_')[0]}_timestamps", name in self._columns
            width = len(self._columns[name]) if is_ids else 1
            self._check_row(name, array, like, request[like], width)
            tensors[name] = array.reshape(-1, width) if is_ids else array.reshape(-1)
        for name in OFFSETS:
            users, length = request[name.replace("offsets", "timestamps")].shape
            tensors[name] = np.arange(users + 1, dtype=np.int32) * np.int32(length)
        check_request(tensors, self._spec, self._limits)
        return tensors

    @staticmethod
    def _check_row(name: str, array: NDArray, like: str, timestamps: NDArray, width: int) -> None:
        users, length = timestamps.shape
        if array.shape != (users, length * width):
            raise InputError(
                f"tensor {name!r} has shape {list(array.shape)}, but {like!r} has {[users, length]}, "
                f"so {[users, length * width]} is needed"
            )

    def score(self, requests: Sequence[Tensors], score: Callable[[Tensors], NDArray]) -> list[NDArray]:
        """Scores ``[users, candidates, tasks]`` per packed request; ``score`` gets batches and answers ``preds``."""
        return [part for batch in self._batches(requests) for part in _split(batch, score(_joined(batch)))]

    def _batches(self, requests: Sequence[Tensors]) -> list[list[Tensors]]:
        """Consecutive requests, as many as the limits of one batch allow."""
        limits = np.asarray([self._limits.users, self._limits.batch_history, self._limits.batch_candidates])
        batches: list[list[Tensors]] = []
        used = limits
        for request in requests:
            users, *tokens = (len(request[name]) for name in ("uih_offsets", "uih_timestamps", "candidate_timestamps"))
            size = np.asarray([users - 1, *tokens])
            used = used + size
            if (used > limits).any():
                batches.append([])
                used = size
            batches[-1].append(request)
        return batches


def _joined(batch: Sequence[Tensors]) -> Tensors:
    lengths = {name: np.concatenate([np.diff(request[name]) for request in batch]) for name in OFFSETS}
    feed = {name: np.concatenate([request[name] for request in batch]) for name in batch[0] if name not in OFFSETS}
    return feed | {name: offsets_of(values) for name, values in lengths.items()}


def _split(batch: Sequence[Tensors], scores: NDArray) -> list[NDArray]:
    counts = [len(request["candidate_timestamps"]) for request in batch]
    parts = np.split(scores, np.cumsum(counts)[:-1])
    return [
        part.reshape(len(request["uih_offsets"]) - 1, -1, scores.shape[1])
        for part, request in zip(parts, batch, strict=True)
    ]
