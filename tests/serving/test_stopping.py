"""Signals to ``serve``: they stop it at once, but cut no request to the server in two."""

import signal
import sys
import threading
from types import SimpleNamespace

import grpc
import pytest
from echo_servers import INFER, OWN_CONNECTION, EchoServer
from grpc import _channel
from waiting import PATIENCE_S

from hstu_trt.serving import starting, stopping
from hstu_trt.serving.stopping import Stopped, heed_stop, raise_if_stopped, stop_on_signals, uninterrupted
from hstu_trt.serving.supervision import supervisor as supervising

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Those of ``serve``, and the ones from before afterwards."""
    before, hook = {number: signal.getsignal(number) for number in SIGNALS}, sys.unraisablehook
    monkeypatch.setattr(stopping._MainThread, "held", 0)
    monkeypatch.setattr(stopping._MainThread, "is_due", False)
    stop_on_signals()
    yield
    sys.unraisablehook = hook
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_stops_and_others_do_nothing(number):
    with pytest.raises(Stopped):
        signal.raise_signal(number)
    for each in SIGNALS:
        signal.raise_signal(each)


def test_what_must_not_be_interrupted_is_done_whole():
    done = []
    with pytest.raises(Stopped), uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    heed_stop()
    with uninterrupted():  # once is enough
        done.append("later")


def test_an_error_meanwhile_does_not_hide_the_signal():
    with pytest.raises(Stopped) as caught, uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_a_signal_that_python_forgets_is_told_again(capsys):
    """An exception in a ``__del__`` is gone; nobody need read of it."""

    class Dropped:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    dropped = Dropped()
    del dropped
    assert capsys.readouterr().err == ""
    for _ in range(2):
        with pytest.raises(Stopped):
            raise_if_stopped()
    heed_stop()
    raise_if_stopped()


def test_nothing_comes_of_no_signal():
    with pytest.raises(ZeroDivisionError), uninterrupted():
        raise ZeroDivisionError


@pytest.fixture
def struck(monkeypatch):
    """A signal comes after gRPC has begun a request, and before anybody waits for its end."""
    real = _channel._run_channel_spin_thread

    def strike(state):
        signal.raise_signal(signal.SIGTERM)
        real(state)

    monkeypatch.setattr(_channel, "_run_channel_spin_thread", strike)


def test_a_canary_is_sent_whole(struck, monkeypatch, tmp_path):
    """Else nothing could close its channel, and ``serve`` would not end after it has said so."""
    server = EchoServer("s0")
    channel, sent = grpc.insecure_channel(server.address, options=OWN_CONNECTION), []

    class Watch:
        def __init__(self, *given):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def look(self):
            sent.append(channel.unary_unary(INFER).future(b"", timeout=PATIENCE_S))

    monkeypatch.setattr(supervising, "Watch", Watch)
    process = SimpleNamespace(plan=SimpleNamespace(url="", tls=None), pid=1, exit_code=None)
    supervisor = supervising.Supervisor(
        launch=lambda: process, canaries=[], tell=print, record=tmp_path / "record", process=process
    )
    with pytest.raises(Stopped):
        supervisor.run()
    assert sent[0].result() == b"s0"
    closing = threading.Thread(target=channel.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    server.stop()


def test_a_first_request_is_answered_whole(monkeypatch, make_model):
    done = []

    class Client:
        def __init__(self, url, name, tls):
            self.name = name

        def __enter__(self):
            return self

        def __exit__(self, *error):
            done.append("closed")

        def ask(self, request):
            signal.raise_signal(signal.SIGTERM)
            done.append(self.name)

    monkeypatch.setattr(starting, "RankingClient", Client)
    deployment = SimpleNamespace(model=make_model(), served=("ranking", "ranking_fused"))
    with pytest.raises(Stopped):
        starting._ask_all(deployment, "", None)
    assert done == ["ranking", "closed"]
