"""A client of a running server: ranks candidates over gRPC.

    client = RankingClient("127.0.0.1:8001")
    scores = client.rank(user={"user_id": 7}, history={"item_id": [3, 1], ...}, candidates={...})

``python -m hstu_trt.serving.client --url 127.0.0.1:8001`` sends a sample request.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.config_json import config_from_json
from hstu_trt.contract.errors import ConfigError, HstuTrtError, InputError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.presets import PRESETS
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, Limits, default_limits
from hstu_trt.serving.answers import Answer, ServerError, answer_of, inputs_of, ranked_text
from hstu_trt.serving.repeats import pause_before_repeat
from hstu_trt.serving.requests import Feature, RankRequest, one_user, pack, sample
from hstu_trt.serving.served import SERVED
from hstu_trt.serving.signature import (
    DRAINING,
    OUT_OF_REACH,
    OVERLOADED,
    USER_METADATA,
)
from hstu_trt.serving.tls import ClientTls, add_client_options, client_tls, connect

DEFAULT_TIMEOUT_S = 30.0
DEFAULT_URL = "127.0.0.1:8001"
_SIDE_BY_SIDE = 8
"""Requests of one call to ``rank_many`` at a time: more would fill the server's queue, and be refused."""


class OverloadedError(ServerError):
    """The server runs, and refused the request before any work on it, since too many wait.

    The same request may be sent again, to another replica at once, or here after a pause.
    """


@dataclass(frozen=True, kw_only=True)
class Call:
    """What goes with a request beside its tensors."""

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    """Named in errors, in the server's events and in its trace."""
    traceparent: str | None = None
    """The caller's span (W3C Trace Context): a server that traces (``serve --trace-otlp``) makes its spans children."""

    def headers(self, user_id: int | str | None) -> dict[str, str] | None:
        """Metadata of the request: the user by whom a gateway chooses a replica, and the span."""
        user = {} if user_id is None else {USER_METADATA: quote(str(user_id))}
        span = {} if self.traceparent is None else {"traceparent": self.traceparent}
        return {**user, **span} or None


class RankingClient:
    """Ranks candidates through ``ranking`` (the ensemble) or ``ranking_fused``. A context manager.

    The model's config comes from the server; no file of the deployment is needed. ``model``: the one that is asked.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: ClientTls | None = None,
    ) -> None:
        """Connects to ``host:port``, encrypted if ``tls`` says how.

        model: None takes what the server serves, ``ranking`` where it serves both.
        Raises ServerError when the server or the model is not there, ConfigError for TLS files that cannot be read.
        """
        if model not in (None, *SERVED):
            raise ConfigError(f"model {model!r} does not rank: choose {ENSEMBLE!r} or {FUSED!r}")
        self.model = model or SERVED[0]
        self._url = url
        self._timeout_s = timeout_s
        self._client = connect(url, tls)
        try:
            self.model, parameters = self._choose(model)
            self.config, self.limits = self._read_config(parameters)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RankingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def rank(
        self, user: Mapping[str, int | Feature], history: Mapping[str, Feature], candidates: Mapping[str, Feature],
        user_id: int | str | None = None,
    ) -> NDArray:  # fmt: skip
        """Scores ``[candidates, tasks]`` FP32 of one user; see ``RankRequest`` for the features.

        Raises InputError when the request is wrong, OverloadedError when too many wait, ServerError when the server
        fails otherwise.
        """
        request = RankRequest(user=user, history=history, candidates=candidates, user_id=user_id)
        return self.rank_many([request])[0]

    def rank_many(self, requests: Sequence[RankRequest]) -> list[NDArray]:
        """Scores of several users: one request to ``ranking``; one per user, 8 at a time, to ``ranking_fused``.

        Behind a gateway, one request goes where the first user's requests go.
        """
        if self.model == FUSED:
            return self._rank_each(requests)
        packed = pack(self.config, requests)
        scores = self.infer(packed, requests[0].user_id)
        return list(np.split(scores, packed["candidate_offsets"][1:-1]))

    def _rank_each(self, requests: Sequence[RankRequest]) -> list[NDArray]:
        scores: list[NDArray] = []
        for first in range(0, len(requests), _SIDE_BY_SIDE):
            some = requests[first : first + _SIDE_BY_SIDE]
            packed = [one_user(pack(self.config, [request])) for request in some]
            futures = [self._send(tensors, request.user_id) for tensors, request in zip(packed, some, strict=True)]
            scores += [self._receive(future)[0] for future in futures]
        return scores

    def infer(self, tensors: Tensors, user_id: int | str | None = None) -> NDArray:
        """Sends tensors as they are and returns ``preds``."""
        return self._receive(self._send(tensors, user_id))

    def ask(self, request: RankRequest, call: Call | None = None) -> Answer:
        """As ``rank``, with what the server tells about the tables."""
        packed = pack(self.config, [request])
        answer = self.ask_packed(one_user(packed) if self.model == FUSED else packed, request.user_id, call)
        return replace(answer, scores=answer.scores[0]) if self.model == FUSED else answer

    def ask_packed(self, tensors: Tensors, user_id: int | str | None = None, call: Call | None = None) -> Answer:
        """Sends tensors as they are."""
        return answer_of(self._send(tensors, user_id, call).result())

    def _send(self, tensors: Tensors, user_id: int | str | None = None, call: Call | None = None) -> Future[Any]:
        """The future of the result, or of the error as ours; gRPC sets one after the timeout.

        What is worth repeating (``repeats.py``) is sent again within the same timeout.
        """
        inputs, deadline = inputs_of(tensors), time.monotonic() + self._timeout_s
        call = call or Call()
        headers = call.headers(user_id)
        future: Future[Any] = Future()
        sent = itertools.count(1)

        def send() -> None:
            left_s = max(deadline - time.monotonic(), 0.001)
            answered = functools.partial(settle, next(sent))
            self._client.async_infer(
                self.model, inputs, answered, request_id=call.request_id, client_timeout=left_s, headers=headers
            )

        def settle(times: int, result: Any, error: Any) -> None:
            if error is None:
                future.set_result(result)
            elif (pause_s := pause_before_repeat(str(error.message()), times)) is not None:
                threading.Timer(pause_s, again, [error]).start()
            else:
                fail(error)

        def again(error: Any) -> None:
            try:
                send()
            except (InferenceServerException, ValueError):  # the client was closed meanwhile
                fail(error)

        def fail(error: Any) -> None:
            future.set_exception(self._translated(error, f" [request {call.request_id}]"))

        send()
        return future

    def _receive(self, future: Future[Any]) -> NDArray:
        scores: NDArray = future.result().as_numpy("preds")
        return scores

    def _choose(self, model: str | None) -> tuple[str, dict[str, str]]:
        """The model to ask, and its parameters. Raises ServerError that names what is served instead."""
        for name in SERVED if model is None else (model,):
            if (parameters := self._parameters_of(name)) is not None:
                return name, parameters
        others = [name for name in SERVED if name != model and self._parameters_of(name) is not None]
        if model is None or not others:
            raise ServerError(f"the server at {self._url} serves neither {' nor '.join(SERVED)}")
        raise ServerError(f"the server at {self._url} serves {' and '.join(others)}, not {model}")

    def _parameters_of(self, model: str) -> dict[str, str] | None:
        """Of ``config.pbtxt``; None: the server has no such model. Raises ServerError."""
        try:
            answer = self._client.get_model_config(model, client_timeout=self._timeout_s)
        except InferenceServerException as error:
            if _is_unknown(error):
                return None
            raise self._translated(error) from None
        return {key: value.string_value for key, value in answer.config.parameters.items()}

    def _read_config(self, parameters: dict[str, str]) -> tuple[HstuConfig, Limits]:
        text = parameters.get("config", "")
        config = PRESETS[text]() if text in PRESETS else config_from_json(json.loads(text or "{}"))
        if not isinstance(config, HstuConfig):
            raise ConfigError(f"the server at {self._url} serves no ranking model")
        limits = Limits(**json.loads(parameters["limits"])) if "limits" in parameters else default_limits(config)
        return config, limits

    def _translated(self, error: InferenceServerException, which: str = "") -> HstuTrtError:
        """The server's error as ours: what the caller sent (InputError), or what the server is (ServerError)."""
        status, message = str(error.status()), f"{error.message()}{which}"
        if status.endswith("INVALID_ARGUMENT"):
            return InputError(message)
        if OVERLOADED in message and status.endswith("UNAVAILABLE"):
            return OverloadedError(f"{self.model} at {self._url}: {message}; try again later, or elsewhere")
        hint = {
            # A server that runs says so of rows that it cannot reach.
            "UNAVAILABLE": ""
            if OUT_OF_REACH in message
            else "; is the server running? hstu-trt serve --deployment DIR starts one",
            "NOT_FOUND": "; a client for what is served finds it, without a model named" if _is_unknown(error) else "",
            "DEADLINE_EXCEEDED": f"; no answer within {self._timeout_s:g} s",
        }.get(status.rpartition(".")[2], "")
        return ServerError(f"{self.model} at {self._url}: {message} ({status.rpartition('.')[2]}){hint}")


def _is_unknown(error: InferenceServerException) -> bool:
    """Whether the server has no such model; one that is stopping says NOT_FOUND, too, in other words."""
    message = str(error.message())
    return str(error.status()).endswith("NOT_FOUND") and not any(words in message for words in DRAINING)


def served_by(url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, tls: ClientTls | None = None) -> tuple[str, ...]:
    """Which of ``SERVED`` the server at ``host:port`` serves. Raises ServerError where it says nothing, or none."""
    with RankingClient(url, timeout_s=timeout_s, tls=tls) as client:
        return tuple(name for name in SERVED if client._parameters_of(name) is not None)


def main(argv: Sequence[str]) -> int:
    """``python -m hstu_trt.serving.client``: ranks the candidates of a sample request."""
    parser = argparse.ArgumentParser(prog="python -m hstu_trt.serving.client", description=main.__doc__)
    parser.add_argument("--url", default=DEFAULT_URL, help=f"host:port of the server's gRPC (default: {DEFAULT_URL})")
    parser.add_argument("--model", choices=SERVED, help=f"(default: what is served, {SERVED[0]} of both)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample request")
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT_S, help="seconds to wait for an answer")
    add_client_options(parser)
    args = parser.parse_args(argv)
    with RankingClient(args.url, args.model, timeout_s=args.timeout, tls=client_tls(args)) as client:
        request = sample(client.config, client.limits, seed=args.seed)
        answer = client.ask(request)
        print(ranked_text(client.config, request, answer.scores))
        print(answer.served_text)
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "client"))
