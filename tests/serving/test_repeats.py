"""A request whose connection or replica was lost is sent again, at most twice, and within its timeout."""

from types import SimpleNamespace

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from hstu_trt.contract.presets import PRESETS
from hstu_trt.serving import client as client_module
from hstu_trt.serving.answers import ServerError
from hstu_trt.serving.client import OverloadedError, RankingClient
from hstu_trt.serving.repeats import pause_before_repeat
from hstu_trt.serving.signature import DRAINING, OVERLOADED, REPLICA_LOST

SENT_THRICE = [
    REPLICA_LOST,
    *DRAINING,
    "Stream removed (sendmsg: Broken pipe (32))",
    "Socket closed",
    "recvmsg:Connection reset by peer",
    "GOAWAY received",
]
SCORES = np.ones((2, 1), np.float32)


class FakeServer:
    """Triton's client as far as ours uses it: each sending ends as the script says, then with scores."""

    def __init__(self, *script):
        self.script, self.timeouts = list(script), []

    def get_model_config(self, model, client_timeout):
        parameters = {"config": SimpleNamespace(string_value=next(iter(PRESETS)))}
        return SimpleNamespace(config=SimpleNamespace(parameters=parameters))

    def async_infer(self, model, inputs, callback, *, request_id, client_timeout, headers):
        self.timeouts.append(client_timeout)
        if self.script:
            callback(None, InferenceServerException(self.script.pop(0), "StatusCode.UNAVAILABLE"))
        else:
            callback(SimpleNamespace(as_numpy={"preds": SCORES}.get), None)

    def close(self):
        pass


@pytest.fixture
def ask(monkeypatch):
    """``ask(server)`` sends it one request."""

    def infer(server, timeout_s=10.0):
        monkeypatch.setattr(client_module, "connect", lambda url, tls: server)
        with RankingClient(timeout_s=timeout_s) as client:
            return client.infer({"x": np.zeros(1, np.int32)})

    return infer


@pytest.mark.parametrize("message", SENT_THRICE)
@pytest.mark.parametrize("lost", [1, 2])
def test_what_was_lost_is_sent_again(ask, message, lost):
    server = FakeServer(*[message] * lost)
    assert ask(server) is SCORES
    assert len(server.timeouts) == 1 + lost
    assert server.timeouts == sorted(server.timeouts, reverse=True), "all sendings share one timeout"


@pytest.mark.parametrize("message", SENT_THRICE)
def test_the_third_loss_is_told(ask, message):
    server = FakeServer(*[message] * 9)
    with pytest.raises(ServerError) as caught:
        ask(server)
    assert message in str(caught.value)
    assert len(server.timeouts) == 3


@pytest.mark.parametrize(
    ("message", "kind"), [(f"{OVERLOADED}8 requests wait", OverloadedError), ("out of memory", ServerError)]
)
def test_other_errors_are_told_at_once(ask, message, kind):
    server = FakeServer(message)
    with pytest.raises(kind, match=message):
        ask(server)
    assert len(server.timeouts) == 1


def test_a_stopping_server_is_given_time():
    """Sent at once, the gateway might choose it again."""
    assert [pause_before_repeat(DRAINING[0], times) for times in (1, 2, 3)] == [0.5, 0.5, None]
    assert [pause_before_repeat(REPLICA_LOST, times) for times in (1, 2, 3)] == [0.0, 0.1, None]
