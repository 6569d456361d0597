"""Canary requests: a verdict on a server from what it answers, since Triton calls a model ready that cannot answer.

    canary = Canary.of(deployment, "127.0.0.1:8001", FUSED)
    reading = canary.ask()          # or send(), which does not wait
    if not reading.verdict.is_healthy: ...

The first answer of each release is what later ones must be. ``serve`` compares the two models with each other before
it calls a server ready, or the one that is served with what ONNX Runtime answers (``reference_answer.py``), so that a
first answer is a right one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, Limits
from hstu_trt.serving.answers import answer_of, inputs_of
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.requests import one_user, pack, sample
from hstu_trt.serving.signature import OUT_OF_REACH
from hstu_trt.serving.tls import ClientTls, connect

DEADLINE_S = 1.5
# Tables may be refreshed with fewer rows than the model's config says: low ids stay valid.
_MOST_IDS = 16
# How gRPC's own UNAVAILABLE differs from one that a server sent: by its words only. One that is not known here counts
# as a server that sheds load, which is watched on, not restarted.
_TRANSPORT = (
    "failed to connect", "Failed to connect", "onnection refused", "onnection reset", "Socket closed", "Stream removed",
    "GOAWAY", "Broken pipe", "ndpoint clos", "recvmsg", "sendmsg",
)  # fmt: skip


class Verdict(Enum):
    """What became of a canary request."""

    RIGHT = "right answer"
    SHED = "shed: the server has too much to do, and says so"
    OUT_OF_REACH = "rows out of reach"
    """The server runs, a cluster of remote tables does not: another server would not help."""
    WRONG = "wrong answer"
    FAILED = "error"
    SILENT = "no answer"
    """Within the deadline: the server hangs, or has too much to do."""
    GONE = "nobody there"

    @property
    def is_healthy(self) -> bool:
        """Whether requests may be sent there."""
        return self in (Verdict.RIGHT, Verdict.SHED, Verdict.OUT_OF_REACH)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One canary request and what became of it."""

    model: str
    verdict: Verdict
    seconds: float
    """From sending it to the verdict."""
    text: str = ""
    """What was wrong, for people."""

    def __str__(self) -> str:
        return f"{self.model}: {self.verdict.value}{f' ({self.text})' if self.text else ''}"


class Sent:
    """A canary request on its way."""

    def __init__(self) -> None:
        self.at = time.monotonic()
        self.future: Future[Reading] = Future()
        self._call: Any = None

    @property
    def reading(self) -> Reading | None:
        """None until there is one."""
        return self.future.result() if self.future.done() else None

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.at

    def cancel(self) -> None:
        """Takes the request back; its reading, if any comes, means nothing."""
        if self._call is not None:
            self._call.cancel()


class Canary:
    """The same small request to one served model of one server, again and again. A context manager.

    dense_in_use: digest of the dense weights that the server says are in use, which may change under tables that stay
    as they are; None: unknown.
    """

    def __init__(
        self, url: str, model: str, config: HstuConfig, limits: Limits, atol: float,
        dense_in_use: Callable[[], str | None] = lambda: None, tls: ClientTls | None = None,
    ) -> None:  # fmt: skip
        self.url, self.model = url, model
        self._atol, self._dense_in_use = atol, dense_in_use
        packed = pack(config, [sample(config, limits)])
        packed = {name: array % _MOST_IDS if name.endswith("_ids") else array for name, array in packed.items()}
        self._inputs = inputs_of(one_user(packed) if model == FUSED else packed)
        self._scores = int(packed["candidate_offsets"][-1]) * len(config.tasks)
        self._known: dict[tuple[str, str | None], NDArray] = {}
        self._client = connect(url, tls)

    @classmethod
    def of(
        cls, deployment: Deployment, url: str, model: str, dense_in_use: Callable[[], str | None] = lambda: None,
        tls: ClientTls | None = None,
    ) -> Canary:  # fmt: skip
        """A canary of a server at ``url`` that serves ``deployment``."""
        folder = deployment.model
        atol = TOLERANCES[ENSEMBLE, folder.tolerances].atol
        return cls(url, model, folder.ranking_config, folder.limits, atol, dense_in_use, tls)

    def __enter__(self) -> Canary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def forget(self) -> None:
        """Takes the next answer for the right one, whatever the last was."""
        self._known.clear()

    def ask(self, deadline_s: float = DEADLINE_S) -> Reading:
        """Sends the request and waits for a verdict."""
        return self.send(deadline_s).future.result()

    def send(self, deadline_s: float = DEADLINE_S) -> Sent:
        """Sends the request; its verdict comes by the deadline."""
        sent, dense = Sent(), self._dense_in_use()

        def answered(result: Any, error: Any) -> None:
            try:
                verdict, text = self._judge(result, dense) if error is None else _judge_error(error)
            except Exception as bug:  # gRPC swallows what a callback raises, and nobody would learn of the answer
                verdict, text = Verdict.FAILED, f"the answer cannot be read: {bug!r}"
            sent.future.set_result(Reading(model=self.model, verdict=verdict, seconds=sent.age_s, text=text))

        try:
            sent._call = self._client.async_infer(self.model, self._inputs, answered, client_timeout=deadline_s)
        except InferenceServerException as error:
            answered(None, error)
        return sent

    def _judge(self, result: Any, dense: str | None) -> tuple[Verdict, str]:
        answer = answer_of(result)
        scores = answer.scores.ravel()
        if scores.size != self._scores:
            return Verdict.WRONG, f"{scores.size} scores instead of {self._scores}"
        if not np.isfinite(scores).all():
            return Verdict.WRONG, f"scores {scores[~np.isfinite(scores)][:3]}"
        if dense != self._dense_in_use():
            return Verdict.RIGHT, ""  # released meanwhile: nobody knows which of the two answered
        known = self._known.setdefault((answer.tables_version, dense), scores)
        difference = float(np.abs(known - scores).max())
        if not difference <= self._atol:
            return Verdict.WRONG, (
                f"scores of tables {answer.tables_version} differ by {difference:.2g} from what they were; "
                f"{self._atol:g} is allowed"
            )
        return Verdict.RIGHT, ""


def _judge_error(error: InferenceServerException) -> tuple[Verdict, str]:
    status, message = str(error.status()).rpartition(".")[2], str(error.message())
    if status == "DEADLINE_EXCEEDED":
        return Verdict.SILENT, message
    if status != "UNAVAILABLE":
        return Verdict.FAILED, f"{status}: {message}"
    if OUT_OF_REACH in message:
        return Verdict.OUT_OF_REACH, message
    return (Verdict.GONE if any(word in message for word in _TRANSPORT) else Verdict.SHED), message
