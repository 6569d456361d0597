"""What a process of the server holds while versions come and go: opens what is published and swaps it in.

    LiveRows    ``embedding_lookup``: releases, tables and the dense model that requests are sent to
    LiveDense   ``hstu``, ``mlp_head``: the dense models that those releases name
    LiveFused   ``ranking_fused``: releases with both in one process

Each opens what is in use as it starts; where that cannot be served, it raises ArtefactError with the way back, or opens
the version before it (``take_first``), as the deployment says. Should ``embedding_lookup`` alone find its part of a
version bad, requests name the dense model of the one before, and the steps open that: late, never mixed. From then on
its ``watcher`` opens what is published beside what is served: whatever is wrong with it is logged, counted and
announced on the board, and the old one goes on. How a request stays with one release: ``releases.py``.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.serving.models.held import Board
from hstu_trt.serving.models.live_stages import DenseStages, FusedRelease, warm
from hstu_trt.serving.models.stages import Stage
from hstu_trt.serving.refresh.releases import (
    Release,
    ReleaseFolder,
    open_own_tables,
    open_tables_of,
    take_first,
)
from hstu_trt.serving.refresh.watching import Refresh, Watcher
from hstu_trt.serving.signature import ENGINE_STEPS
from hstu_trt.tables.live import Live
from hstu_trt.tables.refresh import VersionOpener
from hstu_trt.tables.version import TableVersion

HELD_TIMEOUT_S = 120.0
"""So long ``embedding_lookup`` waits for the other steps to open new dense weights, before it refuses them."""

_LOOKUP = "embedding_lookup"

OpenStage = Callable[[ModelFolder, str], Stage]
"""(dense model, name of the step) -> the step."""


class DenseNotReadyError(HstuTrtError):
    """The other steps do not hold the dense weights of a version."""

    exit_code = 1


@dataclass(kw_only=True)
class Place:
    """Where a model of a running server finds versions and tells what it holds."""

    name: str
    folder: ReleaseFolder
    board: Board
    poll_s: float
    tell: Callable[[Refresh], None]
    """Logs and counts a refresh."""
    every_poll: Callable[[], None] = lambda: None
    _facts: dict[str, Any] = field(default_factory=dict)
    _announcing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of_server(cls, run: Path, **fields: Any) -> Place:
        """In the server that is this process's parent."""
        return cls(board=Board(run, os.getppid()), **fields)

    def announce(self, **facts: Any) -> None:
        """Adds to what the board says of this model."""
        with self._announcing:
            self._facts |= facts
            self.board.write(self.name, self._facts)

    def watch(self, take: Callable[[Path], None]) -> Watcher:
        """A watcher, not yet started, that also announces what it refused."""

        def tell(refresh: Refresh) -> None:
            self.tell(refresh)
            refused = None if refresh.refused is None else {"version": refresh.version, "why": refresh.refused}
            self.announce(refused=refused)

        return Watcher(self.folder, self.poll_s, take, tell, self.every_poll)


class LiveRows:
    """The releases of ``embedding_lookup``.

    dense_is_fixed: the other steps serve the deployment's own dense model only, as TensorRT plans do.
    """

    def __init__(self, place: Place, opener: VersionOpener, *, dense_is_fixed: bool) -> None:
        self._place, self._opener, self._fixed = place, opener, dense_is_fixed
        self.watcher = place.watch(self._take)
        first, passed = take_first(place.folder, self._first)
        self.watcher.passed_over, first.instead_of = passed, passed.version if passed else None
        self.live = Live(first)
        self._announce()

    def _first(self, version: Path | None) -> Release:
        if version is None:
            return Release(open_own_tables(self._place.folder.model, self._opener), self._place.folder.model)
        dense = self._place.folder.dense_of(version)
        self._check_dense(dense)
        return Release(open_tables_of(version, dense, self._opener), dense)

    def _take(self, version: Path) -> None:
        dense = self._place.folder.dense_of(version)
        self._check_dense(dense)
        tables = open_tables_of(version, dense, self._opener, self.live.current.tables)
        try:
            if dense.digest != self.live.current.dense.digest:
                self._wait_for_steps(dense)
        except BaseException:
            tables.close()
            raise
        self.live.swap(Release(tables, dense))
        self._announce()

    def _check_dense(self, dense: ModelFolder) -> None:
        if self._fixed and dense.digest != self._place.folder.model.digest:
            raise ArtefactError(
                f"{dense.path} brings new dense weights, and this deployment's plans are fixed: "
                "assemble a deployment of its own"
            )

    def _wait_for_steps(self, dense: ModelFolder) -> None:
        board = self._place.board
        if board.failure is not None:
            raise DenseNotReadyError(
                f"{dense.path} brings new dense weights, and the steps cannot tell whether they hold them: "
                f"{board.failure}; make {board.folder} writable"
            )
        missing = board.wait_until_held(ENGINE_STEPS, dense.digest, HELD_TIMEOUT_S, self._go_on())
        if missing:
            raise DenseNotReadyError(
                f"{', '.join(missing)} did not open {dense.path} within {HELD_TIMEOUT_S:g} s; see the log"
            )

    def _go_on(self) -> Callable[[], bool]:
        """Sees to metrics, and to what nobody reads any more, while the thread waits; says no once it is to end."""
        due = time.monotonic() + self._place.poll_s

        def go_on() -> bool:
            nonlocal due
            if time.monotonic() >= due:
                self._place.every_poll()
                due = time.monotonic() + self._place.poll_s
            return not self.watcher.stopping

        return go_on

    def _announce(self) -> None:
        self._place.announce(**serves(self.live.current))


class LiveFused:
    """The releases of ``ranking_fused``, with the dense steps of each."""

    def __init__(self, place: Place, opener: VersionOpener, open_stage: OpenStage) -> None:
        self._place, self._opener, self._open_stage = place, opener, open_stage
        self.watcher = place.watch(self._take)
        first, passed = take_first(place.folder, self._first)
        self.watcher.passed_over, first.instead_of = passed, passed.version if passed else None
        first.steps = self._steps(first.dense)
        self.live = Live(first)
        self._announce()

    def _first(self, version: Path | None) -> FusedRelease:
        if version is None:
            return FusedRelease(open_own_tables(self._place.folder.model, self._opener), self._place.folder.model)
        dense = self._place.folder.dense_of(version)
        return FusedRelease(open_tables_of(version, dense, self._opener), dense)

    def _take(self, version: Path) -> None:
        now = self.live.current
        dense = self._place.folder.dense_of(version)
        steps = now.steps if dense.digest == now.dense.digest else self._steps(dense)
        tables = open_tables_of(version, dense, self._opener, now.tables)
        self.live.swap(FusedRelease(tables, dense, steps=steps))
        self._announce()

    def _steps(self, dense: ModelFolder) -> tuple[Stage, Stage]:
        hstu, head = (opened(self._open_stage, dense, step) for step in ENGINE_STEPS)
        return hstu, head

    def _announce(self) -> None:
        self._place.announce(**serves(self.live.current))


class LiveDense:
    """The dense models of ``hstu`` or ``mlp_head``."""

    def __init__(self, place: Place, open_stage: OpenStage) -> None:
        self._place = place
        self.watcher = place.watch(self._take)
        self.stages = DenseStages(
            place.folder,
            lambda model: opened(open_stage, model, place.name),
            in_use=lambda: place.board.dense_in_use(_LOOKUP),
            tell=lambda held: place.announce(holds=held),
        )
        _, self.watcher.passed_over = take_first(place.folder, self._first)

    def _first(self, version: Path | None) -> None:
        if version is not None:
            self._take(version)

    def _take(self, version: Path) -> None:
        self.stages.hold(self._place.folder.dense_of(version))


def opened(open_stage: OpenStage, model: ModelFolder, step: str) -> Stage:
    """A step of a dense model, opened and warmed."""
    stage = open_stage(model, step)
    warm(stage, model.specs[step])
    return stage


def serves(release: Release) -> dict[str, Any]:
    """What is in use, for the board and for metrics."""
    tables: TableVersion = release.tables
    return {
        "tables_version": tables.label,
        "form": "overlay" if tables.overlays else "whole",
        "pair_id": tables.folder.pair_id,
        "dense": release.dense.digest,
        "memory_bytes": tables.memory_bytes,
        "since": time.time(),
        "instead_of": release.instead_of,
    }
