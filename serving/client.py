"""A client of a running server: ranks candidates over gRPC.

    client = RankingClient("127.0.0.1:8001")
    scores = client.rank(user={"user_id": 7}, history={"item_id": [3, 1], ...}, candidates={...})

``python -m hstu_trt.serving.client --url 127.0.0.1:8001`` sends a sample request.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any
from urllib.parse import quote

import numpy as np
import tritonclient.grpc as grpc_client
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.config_json import config_from_json
from hstu_trt.contract.errors import ConfigError, HstuTrtError, InputError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.presets import PRESETS
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, Limits, default_limits
from hstu_trt.contract.text import text_table
from hstu_trt.serving.requests import Feature, RankRequest, one_user, pack, sample
from hstu_trt.serving.signature import (
    DRAINING,
    OUT_OF_REACH,
    OVERLOADED,
    REPLICA_LOST,
    ROW_STATUS,
    TABLES_VERSION,
    USER_METADATA,
)
from hstu_trt.serving.tls import ClientTls, add_client_options, client_tls, connect
from hstu_trt.tables.ids import RowStatus

DEFAULT_TIMEOUT_S = 30.0
DEFAULT_URL = "127.0.0.1:8001"
# Errors after which a request is sent again, and the seconds before it. A connection can be closed, by a gateway that
# reloads say, in the moment in which a request sets out on it; gRPC names that in these words only.
_TRANSPORT_LOST = ("GOAWAY", "Socket closed", "Stream removed", "onnection reset", "Broken pipe")
_WORTH_REPEATING = {**dict.fromkeys(DRAINING, 0.5), **dict.fromkeys((REPLICA_LOST, *_TRANSPORT_LOST), 0.0)}
_SIDE_BY_SIDE = 8
"""Requests of one call to ``rank_many`` at a time: more would fill the server's queue, and be refused."""


class ServerError(HstuTrtError):
    """The server cannot be reached, has no such model, or failed on a good request."""

    exit_code = 1


class OverloadedError(ServerError):
    """The server runs, and refused the request before any work on it, since too many wait.

    The same request may be sent again, to another replica at once, or here after a pause.
    """


@dataclass(frozen=True)
class Answer:
    """What a request got."""

    scores: NDArray
    """``preds``."""
    tables_version: str
    """Name and digest of the tables that answered, as in ``v000002@1f0c5a9be21d``."""
    rows: dict[str, int]
    """How many of the request's rows came from where, by RowStatus in lower case; those with none are left out."""

    @property
    def tables_digest(self) -> str:
        """The same for the same rows, whatever their version is called."""
        return self.tables_version.rpartition("@")[2]

    @property
    def served_text(self) -> str:
        """For people."""
        return f"tables {self.tables_version}, rows: {', '.join(f'{n} {kind}' for kind, n in self.rows.items())}"


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

    The model's config comes from the server; no file of the deployment is needed.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        model: str = ENSEMBLE,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: ClientTls | None = None,
    ) -> None:
        """Connects to ``host:port``, encrypted if ``tls`` says how.

        Raises ServerError when the server or the model is not there, ConfigError for TLS files that cannot be read.
        """
        if model not in (ENSEMBLE, FUSED):
            raise ConfigError(f"model {model!r} does not rank: choose {ENSEMBLE!r} or {FUSED!r}")
        self.model = model
        self._url = url
        self._timeout_s = timeout_s
        self._client = connect(url, tls)
        try:
            self.config, self.limits = self._read_config()
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

        What a gateway lost with a replica, or sent to one that is stopping, is sent once more: scoring changes nothing.
        """
        inputs, deadline = inputs_of(tensors), time.monotonic() + self._timeout_s
        call = call or Call()
        headers = call.headers(user_id)
        future: Future[Any] = Future()

        def send(answered: Callable[[Any, Any], None]) -> None:
            left_s = max(deadline - time.monotonic(), 0.001)
            self._client.async_infer(
                self.model, inputs, answered, request_id=call.request_id, client_timeout=left_s, headers=headers
            )

        def settle(result: Any, error: Any) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(self._translated(error, f" [request {call.request_id}]"))

        def first_answered(result: Any, error: Any) -> None:
            def again() -> None:
                try:
                    send(settle)
                except (InferenceServerException, ValueError):  # the client was closed meanwhile
                    settle(None, error)

            pauses = [pause_s for text, pause_s in _WORTH_REPEATING.items() if text in str(error and error.message())]
            if pauses:
                threading.Timer(pauses[0], again).start()
            else:
                settle(result, error)

        send(first_answered)
        return future

    def _receive(self, future: Future[Any]) -> NDArray:
        scores: NDArray = future.result().as_numpy("preds")
        return scores

    def _read_config(self) -> tuple[HstuConfig, Limits]:
        try:
            answer = self._client.get_model_config(self.model, client_timeout=self._timeout_s)
        except InferenceServerException as error:
            raise self._translated(error) from None
        parameters = {key: value.string_value for key, value in answer.config.parameters.items()}
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
            "DEADLINE_EXCEEDED": f"; no answer within {self._timeout_s:g} s",
        }.get(status.rpartition(".")[2], "")
        return ServerError(f"{self.model} at {self._url}: {message} ({status.rpartition('.')[2]}){hint}")


def inputs_of(tensors: Tensors) -> list[Any]:
    """Tensors as Triton's client takes them."""
    inputs = []
    for name, array in tensors.items():
        tensor = grpc_client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        inputs.append(tensor)
    return inputs


def answer_of(result: Any) -> Answer:
    """What Triton's client got, from a model that ranks. Raises ServerError where outputs are missing."""
    found = {name: result.as_numpy(name) for name in ("preds", ROW_STATUS, TABLES_VERSION)}
    if missing := [name for name, array in found.items() if array is None]:
        raise ServerError(f"an answer without {', '.join(missing)}: it is not that of a model that ranks")
    counts = found[ROW_STATUS].reshape(-1, len(RowStatus)).sum(axis=0)
    rows = {status.name.lower(): int(counts[status]) for status in RowStatus if counts[status]}
    return Answer(found["preds"], found[TABLES_VERSION].ravel()[0].decode(), rows)


def ranked_text(config: HstuConfig, request: RankRequest, scores: NDArray) -> str:
    """The candidates of a request as a table, best first by the first task."""
    order = np.argsort(-scores[:, 0], kind="stable")
    features = config.candidate_features
    rows = [
        (rank, *(int(request.candidates[name][item]) for name in features), *(f"{score:.6f}" for score in scores[item]))
        for rank, item in enumerate(order, start=1)
    ]
    return text_table(("rank", *features, *(task.name for task in config.tasks)), rows)


def main(argv: Sequence[str]) -> int:
    """``python -m hstu_trt.serving.client``: ranks the candidates of a sample request."""
    parser = argparse.ArgumentParser(prog="python -m hstu_trt.serving.client", description=main.__doc__)
    parser.add_argument("--url", default=DEFAULT_URL, help=f"host:port of the server's gRPC (default: {DEFAULT_URL})")
    parser.add_argument("--model", choices=(ENSEMBLE, FUSED), default=ENSEMBLE)
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
