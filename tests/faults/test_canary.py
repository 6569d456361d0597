"""What a canary makes of an answer, with a stand-in for Triton's client."""

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from hstu_trt.serving.signature import OUT_OF_REACH, ROW_STATUS, TABLES_VERSION
from hstu_trt.serving.supervision import canary as canaries
from hstu_trt.serving.supervision.canary import Canary, Verdict
from hstu_trt.tables.ids import RowStatus

pytestmark = pytest.mark.faults
SCORES = np.linspace(0.1, 0.9, 5, dtype=np.float32)[:, None]


class Result:
    def __init__(self, scores, version):
        self._arrays = {
            "preds": scores,
            TABLES_VERSION: np.asarray([version.encode()], object),
            ROW_STATUS: np.zeros(len(RowStatus), np.int64),
        }

    def as_numpy(self, name):
        return self._arrays[name]


class Client:
    """Answers with what it is given: (scores, version), or an error."""

    def __init__(self, url, tls):
        self.answer = (SCORES, "v1@aa")

    def async_infer(self, model, inputs, callback, client_timeout):
        if isinstance(self.answer, Exception):
            callback(None, self.answer)
        else:
            callback(Result(*self.answer), None)

    def close(self):
        pass


@pytest.fixture
def canary(monkeypatch, deployment):
    monkeypatch.setattr(canaries, "connect", Client)
    with Canary.of(deployment, "url", "ranking", lambda: canary.dense) as canary:
        canary.dense = "d1"
        yield canary


def ask(canary, scores=SCORES, version="v1@aa"):
    canary._client.answer = (scores, version)
    return canary.ask()


def with_nan(value):
    scores = SCORES.copy()
    scores[2] = value
    return scores


WRONG = {
    "other scores": (SCORES + 0.01, "differ by 0.01"),
    "too few": (SCORES[:3], "3 scores instead of 5"),
    "not a number": (with_nan(np.nan), "nan"),
    "infinite": (with_nan(np.inf), "inf"),
    "none": (SCORES[:0], "0 scores"),
}


@pytest.mark.parametrize(("scores", "text"), WRONG.values(), ids=WRONG)
def test_wrong_answers(canary, scores, text):
    assert ask(canary).verdict is Verdict.RIGHT
    reading = ask(canary, scores)
    assert reading.verdict is Verdict.WRONG
    assert text in reading.text
    assert ask(canary, SCORES + 1e-6).verdict is Verdict.RIGHT


def test_each_release_has_answers_of_its_own(canary):
    assert ask(canary).verdict is Verdict.RIGHT
    assert ask(canary, SCORES + 0.1, "v2@bb").verdict is Verdict.RIGHT
    assert ask(canary, SCORES, "v2@bb").verdict is Verdict.WRONG
    assert ask(canary).verdict is Verdict.RIGHT
    canary.dense = "d2"
    assert ask(canary, SCORES + 0.2).verdict is Verdict.RIGHT, "other dense weights under the same tables"
    assert ask(canary, SCORES).verdict is Verdict.WRONG
    canary.forget()
    assert ask(canary, SCORES).verdict is Verdict.RIGHT


def test_a_release_meanwhile_proves_nothing(canary):
    assert ask(canary).verdict is Verdict.RIGHT
    told = iter(["d1", "d2"])
    canary._dense_in_use = lambda: next(told)
    assert ask(canary, SCORES + 0.1).verdict is Verdict.RIGHT


def test_an_answer_that_cannot_be_read(canary):
    assert ask(canary, None).verdict is Verdict.FAILED


ERRORS = {
    "shed": ("UNAVAILABLE", "Exceeds maximum queue size", Verdict.SHED),
    "shed in other words": ("UNAVAILABLE", "too busy", Verdict.SHED),
    "remote": ("UNAVAILABLE", OUT_OF_REACH + "table item_id", Verdict.OUT_OF_REACH),
    "refused": ("UNAVAILABLE", "failed to connect to all addresses; last error: Connection refused", Verdict.GONE),
    "cut": ("UNAVAILABLE", "Stream removed (Socket closed)", Verdict.GONE),
    "late": ("DEADLINE_EXCEEDED", "Deadline Exceeded", Verdict.SILENT),
    "stub": ("INTERNAL", "Stub process 'hstu_0_0' is not healthy.", Verdict.FAILED),
    "unloaded": ("NOT_FOUND", "has no available versions", Verdict.FAILED),
    "bad": ("INVALID_ARGUMENT", "id 3", Verdict.FAILED),
}


@pytest.mark.parametrize(("status", "message", "verdict"), ERRORS.values(), ids=ERRORS)
def test_errors(canary, status, message, verdict):
    canary._client.answer = InferenceServerException(message, f"StatusCode.{status}")
    reading = canary.ask()
    assert reading.verdict is verdict
    assert message in str(reading)
    healthy = (Verdict.RIGHT, Verdict.SHED, Verdict.OUT_OF_REACH)
    assert reading.verdict.is_healthy == (verdict in healthy)
