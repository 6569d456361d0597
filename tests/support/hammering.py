"""Clients that ask a server without a pause, and hold each answer against the right scores."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
from waiting import PATIENCE_S, eventually

from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.serving.client import RankingClient

EXACT = 1e-6
BOTH = ("ranking", "ranking_fused")


@dataclass
class Outcome:
    """What clients saw, in the order of time."""

    right: dict[str, list[float]] = field(default_factory=lambda: {model: [] for model in BOTH})
    """When right answers came, by model."""
    failed: list[tuple[float, float, str, str]] = field(default_factory=list)
    """(when, after how long, model, message) of requests that got an error."""
    wrong: list[str] = field(default_factory=list)


class Hammer:
    """One client for each model of the cases until the block ends; ``outcome`` grows meanwhile.

    cases: model -> [(request, right scores)].
    """

    def __init__(self, url, cases, timeout_s=20.0, atol=EXACT):
        self.outcome, self._atol = Outcome(), atol
        self._url, self._cases, self._timeout_s = url, cases, timeout_s
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(model,)) for model in cases]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_answers(self, since, count=3, timeout_s=PATIENCE_S):
        """Waits until all have answered so often since then, and returns when the slowest first did."""

        def came():
            times = [[at for at in list(self.outcome.right[model]) if at > since] for model in self._cases]
            return max(min(found) for found in times) if all(len(found) >= count for found in times) else None

        return eventually(came, lambda: f"no answers; the last error: {self.outcome.failed[-1:]}", timeout_s)

    def wait_for_failures(self, since):
        """Waits until a request has failed since then."""
        eventually(lambda: any(at > since for at, *_ in list(self.outcome.failed)), "no request failed")

    def _run(self, model):
        with RankingClient(self._url, model, timeout_s=self._timeout_s) as client:
            turn = 0
            while not self._stop.is_set():
                request, expected = self._cases[model][turn % len(self._cases[model])]
                self._ask(client, model, request, expected)
                turn += 1

    def _ask(self, client, model, request, expected):
        began = time.monotonic()
        try:
            scores = client.ask(request).scores
        except HstuTrtError as error:
            now = time.monotonic()
            self.outcome.failed.append((now, now - began, model, str(error)))
            time.sleep(0.02)  # refused at once: not so many that nothing else runs
            return
        if scores.shape == expected.shape and np.abs(scores - expected).max() <= self._atol:
            self.outcome.right[model].append(time.monotonic())
        else:
            self.outcome.wrong.append(f"{model}: {scores.ravel()[:3]} instead of {expected.ravel()[:3]}")
