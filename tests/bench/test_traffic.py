"""Sending requests: every request is sent once, and one failure ends the rest."""

import numpy as np
import pytest

from hstu_trt.bench.load import traffic
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.tensors import ENSEMBLE, FUSED


class FakeClient:
    sent: list[int]
    bad = -1

    def __init__(self, url, model):
        self.model = model

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def infer(self, tensors):
        number = int(tensors["x"][0])
        FakeClient.sent.append(number)
        if number == FakeClient.bad:
            raise InputError("planted")
        scores = np.full((2, 1), number, np.float32)
        return scores[None] if self.model == FUSED else scores


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(traffic, "RankingClient", FakeClient)
    FakeClient.sent, FakeClient.bad = [], -1
    return FakeClient


def requests(count):
    return [{"x": np.asarray([number])} for number in range(count)]


@pytest.mark.parametrize("model", [ENSEMBLE, FUSED])
@pytest.mark.parametrize(("count", "clients"), [(1, 1), (7, 3), (2, 8), (16, 8)])
def test_each_request_is_sent_once_and_answered_in_its_place(fake, model, count, clients):
    answers = traffic.send("planted", model, requests(count), clients=clients)
    assert sorted(fake.sent) == list(range(count))
    assert [score[0, 0] for score in answers.scores] == list(range(count))
    assert all(score.shape == (2, 1) for score in answers.scores)
    assert (answers.latency_ms > 0).all()
    assert answers.seconds > 0


def test_a_failed_request_ends_the_rest(fake):
    fake.bad = 0
    with pytest.raises(InputError, match="planted"):
        traffic.send("planted", ENSEMBLE, requests(100), clients=1)
    assert fake.sent == [0]
