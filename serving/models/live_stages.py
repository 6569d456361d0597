"""Stages over what is in use: each request, or batch, pins one release and names it in its answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, HstuTrtError, InputError
from hstu_trt.contract.features import Tensors, check_request
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.tensors import Dim, StageSpec, TensorSpec
from hstu_trt.serving.models.stages import FusedStage, RequestError, Stage, UserBatches, each
from hstu_trt.serving.models.table_ids import count_by_user
from hstu_trt.serving.refresh.releases import Release, ReleaseFolder
from hstu_trt.serving.signature import ATTENTION_NORM, DENSE_ID, OFFSETS, ROW_STATUS, TABLES_VERSION
from hstu_trt.tables.delta import tables_digest
from hstu_trt.tables.ids import Policy, RowStatus
from hstu_trt.tables.live import Live
from hstu_trt.tables.lookup_stage import RowsOfModel
from hstu_trt.tables.version import version_label

MOST_DENSE_MODELS = 2
"""Dense models that a process holds: the one in use, and the one before or after it."""


class DenseLostError(HstuTrtError):
    """A dense model that the server chose is no longer there."""

    exit_code = 1


class Tally:
    """Counts for metrics. One thread at a time looks up, another may take the counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows = np.zeros(len(RowStatus), np.int64)
        self._bad: Counter[str] = Counter()

    def add_rows(self, counts: NDArray) -> None:
        """counts ``[..., 7]`` by RowStatus."""
        with self._lock:
            self._rows = self._rows + counts.reshape(-1, len(RowStatus)).sum(axis=0)

    @contextmanager
    def bad_ids(self, counter: Counter[str]) -> Iterator[None]:
        """Takes over what the block adds to a counter of bad ids, those of rejected requests too."""
        before = Counter(counter)
        try:
            yield
        finally:
            if counter != before:
                with self._lock:
                    self._bad += Counter(counter) - before

    def take(self) -> tuple[dict[str, int], dict[str, int]]:
        """Rows by status and bad ids by table since the last call."""
        with self._lock:
            rows, bad = self._rows, self._bad
            self._rows, self._bad = np.zeros_like(rows), Counter()
        return {status.name.lower(): int(rows[status]) for status in RowStatus if rows[status]}, dict(bad)


class LiveLookup:
    """``embedding_lookup``: the rows of one release, its label, and the dense model that goes with them."""

    def __init__(self, live: Live[Release], model: ModelFolder, policy: Policy, *, sends_dense: bool) -> None:
        self.spec = model.specs["embedding_lookup"]
        self.tally = Tally()
        self._live, self._limits, self._sends_dense = live, model.limits, sends_dense
        self._rows = RowsOfModel(model, policy)

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        """Ids by name -> rows, ``tables_version`` [1], ``row_status`` [7], ``dense_id`` [1].

        Raises InputError, or RemoteError.
        """
        check_request(feed, self.spec, self._limits)
        with self._live.pin() as release, self.tally.bad_ids(release.tables.rows.bad_ids):
            rows, status = self._rows.look_up(release.tables.rows, feed)
        counts = np.bincount(np.concatenate([part.ravel() for part in status.values()]), minlength=len(RowStatus))
        self.tally.add_rows(counts)
        dense = {DENSE_ID: text_tensor(release.dense.digest)} if self._sends_dense else {}
        return {**rows, **dense, TABLES_VERSION: text_tensor(release.tables.label), ROW_STATUS: counts}


def text_tensor(text: str) -> NDArray:
    """``[1]``, as Triton's TYPE_STRING."""
    return np.asarray([text.encode()], dtype=object)


class DenseStages:
    """``hstu`` or ``mlp_head`` of the dense models in use, by digest. Threads may share it.

    in_use: digest of the dense model that ``embedding_lookup`` sends requests to; it is never let go of. What comes
    after it may be refused there, however often. tell: gets the digests whenever they have changed.
    """

    def __init__(
        self, folder: ReleaseFolder, open_stage: Callable[[ModelFolder], Stage], *,
        in_use: Callable[[], str | None] = lambda: None, tell: Callable[[list[str]], None] = lambda held: None,
    ) -> None:  # fmt: skip
        self._folder, self._open, self._in_use, self._tell = folder, open_stage, in_use, tell
        self._stages: dict[str, Stage] = {}
        self._once_held: set[str] = set()
        self._opening = threading.Lock()
        self.hold(folder.model)

    @property
    def held(self) -> list[str]:
        """Digests, the newest last."""
        return list(self._stages)

    def hold(self, model: ModelFolder) -> Stage:
        """Opens a dense model, if it is not held, and lets go of the oldest beyond two."""
        with self._opening:
            stage = self._stages.get(model.digest) or self._open(model)
            others = {digest: held for digest, held in self._stages.items() if digest != model.digest}
            in_use, room = self._in_use(), MOST_DENSE_MODELS - 1
            while len(others) > room:
                del others[next(digest for digest in others if digest != in_use)]
            self._stages = {**others, model.digest: stage}
            self._once_held.add(model.digest)
            self._tell(self.held)
        return stage

    def infer(self, tensors: Mapping[str, NDArray]) -> Tensors:
        """Answers with the dense model that ``dense_id`` names; opens it where it is no longer, or not yet, held.

        Raises InputError for a name that was never served, or where the stage does; DenseLostError for one that was.
        """
        feed = dict(tensors)
        (name,) = feed.pop(DENSE_ID).tolist()
        digest = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        stage = self._stages.get(digest)
        return (self._reopen(digest) if stage is None else stage).infer(feed)

    def _reopen(self, digest: str) -> Stage:
        try:
            return self.hold(self._folder.dense_by_digest(digest))
        except ArtefactError as error:
            if digest in self._once_held or digest == self._in_use():
                raise DenseLostError(f"the dense model in use is gone: {error}") from None
            raise InputError(f"tensor {DENSE_ID!r} names no dense model: {error}") from None


@dataclass(frozen=True)
class FusedAnswer:
    """What a request to ``ranking_fused`` gets."""

    scores: NDArray
    """``[users, candidates, tasks]``."""
    version: str
    row_status: NDArray
    """``[users, 7]`` int64."""


@dataclass(eq=False)
class FusedRelease(Release):
    """A release with the dense model's runners: ``hstu`` and ``mlp_head``."""

    steps: tuple[Stage, Stage] | None = None


class LiveFusedStage:
    """``ranking_fused`` over host tables: all waiting requests as batches of one release.

    The rows are looked up per request, so that a bad id spoils its own request only.
    """

    def __init__(self, live: Live[FusedRelease], model: ModelFolder, policy: Policy) -> None:
        self.tally = Tally()
        self._live, self._users, self._rows = live, UserBatches(model), RowsOfModel(model, policy)

    def answer_many(self, requests: Sequence[Mapping[str, NDArray]]) -> list[FusedAnswer | RequestError]:
        """An answer per request, or what is wrong with that request."""
        with self._live.pin() as release:
            with self.tally.bad_ids(release.tables.rows.bad_ids):
                found = each(lambda request: self._look_up(release, request), requests)
            good = [item for item in found if not isinstance(item, RequestError)]
            scores = iter(self._users.score([packed for packed, _ in good], lambda feed: _dense_scores(release, feed)))
        for _, counts in good:
            self.tally.add_rows(counts)
        return [
            item if isinstance(item, RequestError) else FusedAnswer(next(scores), release.tables.label, item[1])
            for item in found
        ]

    def _look_up(self, release: Release, request: Mapping[str, NDArray]) -> tuple[Tensors, NDArray]:
        """Rows in place of the ids, and the rows' status ``[users, 7]``."""
        packed = self._users.pack(request)
        rows, status = self._rows.look_up(release.tables.rows, packed)
        users = len(packed["uih_offsets"]) - 1
        kept = {name: array for name, array in packed.items() if name not in status}
        return kept | rows, count_by_user(users, list(status.values()))


def _dense_scores(release: FusedRelease, feed: Tensors) -> NDArray:
    assert release.steps is not None
    hstu, head = release.steps
    rows = {"candidate_embeddings": feed["candidate_embeddings"]}
    return head.infer(hstu.infer(feed) | rows)["preds"]


class FixedFusedStage:
    """``ranking_fused`` as one engine with tables of its own, which no refresh reaches."""

    def __init__(self, engine: FusedStage, model: ModelFolder) -> None:
        self.tally = Tally()
        self._engine, self._model = engine, model
        self._version = version_label(model.name, tables_digest(model.tables))

    def answer_many(self, requests: Sequence[Mapping[str, NDArray]]) -> list[FusedAnswer | RequestError]:
        """An answer per request, or what is wrong with that request."""
        with self.tally.bad_ids(self._engine.bad_ids):
            found = self._engine.infer_many(requests)
        answers: list[FusedAnswer | RequestError] = []
        for scores, request in zip(found, requests, strict=True):
            if isinstance(scores, RequestError):
                answers.append(scores)
                continue
            status = count_by_user(len(request["candidate_timestamps"]), self._engine.row_status(request))
            self.tally.add_rows(status)
            answers.append(FusedAnswer(scores, self._version, status))
        return answers

    def serves(self) -> dict[str, Any]:
        """What is in use, for metrics."""
        return {
            "tables_version": self._version,
            "form": "engine",
            "pair_id": self._model.pair_id,
            "dense": self._model.digest,
            "memory_bytes": 0,
            "since": time.time(),
            "instead_of": None,
        }


def warm(stage: Stage, spec: StageSpec) -> None:
    """Runs a stage once, on the smallest feed: first runs are slow."""
    stage.infer(smallest_feed(spec))


def smallest_feed(spec: StageSpec) -> Tensors:
    """One user with one event and one candidate, all ids 0; without the attention norm."""
    return {tensor.name: _smallest(tensor) for tensor in spec.without(ATTENTION_NORM).inputs}


def _smallest(tensor: TensorSpec) -> NDArray:
    if tensor.name in OFFSETS:
        return np.asarray([0, 1], tensor.dtype)
    return np.zeros([1 if isinstance(dim, Dim) else dim for dim in tensor.dims], tensor.dtype)
