"""Load on the served models of a running server while versions are published, each answer held to what it names."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.tables.refresh_versions import Published
from hstu_trt.contract.errors import GateError, HstuTrtError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.tensors import FUSED
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.models.stages import RunnerStage
from hstu_trt.serving.requests import one_user
from hstu_trt.serving.served import SERVED, lookups_of
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.lookup_stage import RowsOfModel

SAME = 1e-5
"""Scores of one version differ by less, whoever shares a batch."""
OTHER = 1e-4
"""Scores of two versions differ by more, in some candidate of every request."""


@dataclass(frozen=True)
class Sample:
    """One answered request."""

    model: str
    began: float
    ended: float
    verdict: str
    """``ok``; ``mixed``: not the scores of the version that it names; else the error."""


def expected_scores(version: Published, requests: Sequence[Tensors], norm: float) -> list[NDArray]:
    """The scores ``[candidates, tasks]`` that a version gives, without a server."""
    rows_of, tables = RowsOfModel(version.dense, "reject"), HostTables.open(version.tables)
    found = []
    with OnnxRuntimeRunner(version.dense, "hstu") as hstu, OnnxRuntimeRunner(version.dense, "mlp_head") as head:
        for request in requests:
            rows, status = rows_of.look_up(tables, request)
            payload = {name: array for name, array in request.items() if name not in status}
            vectors = RunnerStage(hstu, norm).infer(rows | payload)
            candidates = {"candidate_embeddings": rows["candidate_embeddings"]}
            found.append(RunnerStage(head, None).infer(vectors | candidates)["preds"])
    return found


def check_tellable(scores: Mapping[str, Sequence[NDArray]]) -> None:
    """Raises GateError if two versions answer a request alike: then no check could tell them apart."""
    labels = list(scores)
    for number, label in enumerate(labels):
        for other in labels[:number]:
            for index, (a, b) in enumerate(zip(scores[label], scores[other], strict=True)):
                if np.abs(a - b).max() < OTHER:
                    raise GateError(f"versions {label} and {other} cannot be told apart by request {index}")


@dataclass
class Load:
    """Closed-loop clients of the served models; every client waits for an answer before it sends its next request."""

    url: str
    requests: Sequence[Tensors]
    expected: Mapping[str, Sequence[NDArray]]
    """Label -> scores per request."""
    clients: int
    models: Sequence[str] = SERVED
    samples: list[Sample] = field(default_factory=list)
    named: set[str] = field(default_factory=set)
    """Labels that answers bore."""

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(self.clients * len(self.models))
        self._running = [self._pool.submit(self._work, model, n) for model in self.models for n in range(self.clients)]
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for future in self._running:
            future.result()

    def _work(self, model: str, first: int) -> None:
        with RankingClient(self.url, model, timeout_s=20) as client:
            index = first
            while not self._stop.is_set():
                index = (index + 1) % len(self.requests)
                began = time.monotonic()
                verdict = self._ask(client, index)
                self.samples.append(Sample(model, began, time.monotonic(), verdict))

    def _ask(self, client: RankingClient, index: int) -> str:
        request = self.requests[index]
        try:
            answer = client.ask_packed(one_user(request) if client.model == FUSED else request)
        except HstuTrtError as error:
            return str(error)
        self.named.add(answer.tables_version)
        wanted = self.expected.get(answer.tables_version)
        scores = answer.scores[0] if client.model == FUSED else answer.scores
        return "ok" if wanted is not None and np.abs(wanted[index] - scores).max() <= SAME else "mixed"


def wait_for(live: Path, version: Published, served: Sequence[str] = SERVED, timeout_s: float = 60.0) -> None:
    """Waits until all that is served serves a version, or has refused it. Raises GateError after the timeout."""
    deadline = time.monotonic() + timeout_s
    seen: dict[str, object] = {}
    while time.monotonic() < deadline:
        boards = [json.loads((live / f"{name}.json").read_text()) for name in lookups_of(served)]
        for board in boards:
            refused = board.get("refused") or {}
            seen[board["model"]] = refused or board["tables_version"]
            done = version.must_be_refused and refused.get("version") == version.name
            board["done"] = done or (not version.must_be_refused and board["tables_version"] == version.label)
        if all(board["done"] for board in boards):
            return
        time.sleep(0.05)
    raise GateError(f"{version.name} ({version.label}) was not taken as it should within {timeout_s:g} s: {seen}")
