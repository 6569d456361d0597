"""Starting a server: what can be known before, how long to wait, and whether its first answer is right."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from hstu_trt.contract.errors import GateError, HstuTrtError
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.tensors import ENSEMBLE
from hstu_trt.serving import lint
from hstu_trt.serving.answers import Answer, ServerError
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.operating import hide_key
from hstu_trt.serving.reference_answer import allowed_difference, reference_of
from hstu_trt.serving.refresh.releases import ReleaseFolder, check_published
from hstu_trt.serving.refresh.settings import takes_previous
from hstu_trt.serving.requests import sample
from hstu_trt.serving.served import models_of
from hstu_trt.serving.server import LaunchPlan
from hstu_trt.serving.server_process import ServerProcess
from hstu_trt.serving.stopping import raise_if_stopped, uninterrupted
from hstu_trt.serving.supervision.failure import cause_of_failure
from hstu_trt.serving.tier_report import check_tiers
from hstu_trt.serving.tls import ClientTls, connect

READY_TIMEOUT_S = 120.0
POLL_S = 0.1
"""Between two looks at a server."""
_CANARY_TURNS, _CANARY_PAUSE_S = 4, 0.5
_ASK_S = 5.0
"""Beyond which a question to a server that starts is asked again."""


class StartError(HstuTrtError):
    """The server did not become ready, or died."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Ready:
    """What a ready server reported."""

    version: str
    seconds: float
    """From launch to the canary's answer."""
    canary_difference: float | None
    """Largest difference of the first scores from the other model's, or ONNX Runtime's; None: nothing to compare."""


def check(deployment: Deployment, *, hash_tables: bool = False, connect: bool = True) -> None:
    """What can be known before a launch; hashing the tables reads them whole, so only ``--check`` does.

    connect: also asks the clusters of remote tables. Raises ArtefactError, ConfigError for more memory than there is,
    RemoteError, or GateError that lists the findings of the lint.
    """
    check_tiers(deployment, hash_tables=hash_tables, connect=connect)
    folder = ReleaseFolder(deployment.versions, deployment.model, takes_previous(deployment.bad_version))
    check_published(folder, tell=lambda text: print(f"warning: {text}", file=sys.stderr))
    lint.require_clean(deployment.repository, deployment.model, deployment.flavour, deployment.served)


def start(deployment: Deployment, plan: LaunchPlan, timeout_s: float = READY_TIMEOUT_S) -> tuple[ServerProcess, Ready]:
    """Launches the server and waits until every model answers. Raises StartError with the cause from the log."""
    began = time.monotonic()
    process = ServerProcess(plan)
    try:
        version = _wait_until_ready(process, models_of(deployment.served), timeout_s)
        hide_key(process.pid, plan)
        difference = _first_answer(deployment, plan.url, plan.tls)
    except BaseException as error:
        process.drain(timeout_s=5)
        if isinstance(error, ServerError):
            raise start_error("the server did not answer the first request", plan, str(error)) from None
        raise
    return process, Ready(version=version, seconds=time.monotonic() - began, canary_difference=difference)


def _wait_until_ready(process: ServerProcess, models: Sequence[str], timeout_s: float) -> str:
    """Returns the server's version once every model is ready."""
    client = connect(process.plan.url, process.plan.tls)
    waiting, deadline = list(models), time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            raise_if_stopped()
            if process.exit_code is not None:
                raise start_error(f"tritonserver exited with code {process.exit_code} while starting", process.plan)
            with suppress(InferenceServerException):
                waiting = [name for name in waiting if not client.is_model_ready(name, client_timeout=_ASK_S)]
                if not waiting:
                    return str(client.get_server_metadata(client_timeout=_ASK_S).version)
            time.sleep(POLL_S)
    finally:
        client.close()
    raise start_error(f"models not ready after {timeout_s:g} s: {', '.join(waiting)}", process.plan)


def start_error(what: str, plan: LaunchPlan, *details: str) -> StartError:
    """What happened, with the cause from the server's log."""
    lines = [what, *details, *cause_of_failure(plan.log)]
    return StartError("\n  ".join(lines) + f"\n  full log: {plan.log}")


def _first_answer(deployment: Deployment, url: str, tls: ClientTls | None = None) -> float | None:
    """A made-up request through all that is served; Triton calls a model ready that cannot answer one.

    Two models are held against each other, one against ``reference_answer.py``. None where nothing can be compared: two
    models of different tables, for good if the fused model is an engine with tables of its own and others have been
    published, for a moment while one takes what the other has; one model of tables that nobody else can read. Raises
    GateError for other scores.
    """
    for turn in range(_CANARY_TURNS):
        if turn:
            time.sleep(_CANARY_PAUSE_S)
        answers = _ask_all(deployment, url, tls)
        if len(answers) == 1:
            (name,) = answers
            known = reference_of(deployment, answers[name].tables_digest)
            if known is not None:
                allowed = allowed_difference(deployment.model)
                return _difference(name, answers[name].scores, "ONNX Runtime", known.scores, allowed)
            if not deployment.versions.exists():
                return None
        else:
            (name, one), (other, two) = answers.items()
            if one.tables_digest == two.tables_digest:
                allowed = TOLERANCES[ENSEMBLE, deployment.model.tolerances].atol
                return _difference(name, one.scores, other, two.scores, allowed)
    return None


def _ask_all(deployment: Deployment, url: str, tls: ClientTls | None) -> dict[str, Answer]:
    """The answer of each served model to the same request."""
    request, answers = sample(deployment.model.ranking_config, deployment.model.limits), {}
    for name in deployment.served:
        with uninterrupted(), RankingClient(url, name, tls=tls) as client:
            answers[name] = client.ask(request)
    return answers


def _difference(name: str, scores: NDArray, other: str, others: NDArray, allowed: float) -> float:
    difference = float(np.abs(scores - others).max()) if scores.shape == others.shape else math.nan
    if not difference <= allowed:
        raise GateError(f"{name} and {other} disagree by {difference:.2g} on a sample request; {allowed:g} is allowed")
    return difference
