"""Sends packed requests to a running server and takes the times."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.features import Tensors
from hstu_trt.contract.tensors import FUSED
from hstu_trt.serving.client import RankingClient

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a served model answered to requests of one user each."""

    clients: int
    scores: list[NDArray]
    """Per request ``[candidates, tasks]`` FP32."""
    latency_ms: NDArray
    """Per request, from the call of the client to its answer."""
    seconds: float
    """From the first request to the last answer."""

    def figures(self) -> tuple[int, int, float, float, float, float]:
        """Requests, clients, latency percentiles 50, 90 and 99 in ms, requests per second."""
        p50, p90, p99 = (round(float(value), 2) for value in np.percentile(self.latency_ms, PERCENTILES))
        return len(self.scores), self.clients, p50, p90, p99, round(len(self.scores) / self.seconds, 1)


def send(url: str, model: str, requests: Sequence[Tensors], *, clients: int) -> Answers:
    """Sends each request once; every client waits for an answer before it sends its next request.

    requests: inputs of ``model`` for one user each. Raises ServerError or InputError as the client does.
    """
    scores: list[NDArray] = [np.empty(0)] * len(requests)
    latency_ms = np.zeros(len(requests))
    stop = threading.Event()

    def work(first: int) -> None:
        with RankingClient(url, model) as client:
            for index in range(first, len(requests), clients):
                if stop.is_set():
                    return
                began = time.perf_counter()
                answer = client.infer(requests[index])
                latency_ms[index] = 1e3 * (time.perf_counter() - began)
                scores[index] = answer[0] if model == FUSED else answer

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        try:
            list(pool.map(work, range(clients)))
        finally:
            # An error of one client, or an interrupt, ends the others after the request at hand.
            stop.set()
    return Answers(clients=clients, scores=scores, latency_ms=latency_ms, seconds=time.perf_counter() - began)
