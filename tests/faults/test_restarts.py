"""What dies or stops is restarted within 5 s under load, and no answer is ever wrong.

What a client sees: requests on the way fail with UNAVAILABLE or INTERNAL, new ones with UNAVAILABLE until the next
server answers. A client that keeps its connection and asks again needs nothing else.
"""

import json
import os
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from hammering import BOTH, Hammer
from served import Serve, in_process, request_of
from supervised import ALLOWED_S, STABLE_S, Supervised, is_running, process_of, regions, regions_of
from waiting import eventually

from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.server import choose_port
from hstu_trt.serving.supervision.processes import SERVER

pytestmark = [pytest.mark.triton, pytest.mark.faults]

STOPPED = "was stopped by a signal"
FAULTS = [
    ("embedding_lookup", signal.SIGKILL, "died"),
    ("hstu", signal.SIGKILL, "died"),
    ("mlp_head", signal.SIGKILL, "died"),
    ("ranking_fused", signal.SIGKILL, "died"),
    (SERVER, signal.SIGKILL, "died"),
    ("hstu", signal.SIGSTOP, STOPPED),
    ("ranking_fused", signal.SIGSTOP, STOPPED),
    (SERVER, signal.SIGSTOP, STOPPED),
]


@pytest.fixture(scope="module")
def cases(deployment):
    requests = [request_of(deployment, *lengths, seed) for seed, lengths in enumerate([(8, 5), (64, 40), (0, 3)])]
    return {model: [(request, in_process(deployment, model, request)) for request in requests] for model in BOTH}


@pytest.fixture(scope="module")
def metrics_port():
    return choose_port("127.0.0.1", 0)


@pytest.fixture(scope="module")
def supervised(deployment, metrics_port):
    serve = Supervised(deployment, "--metrics-port", str(metrics_port))
    yield serve
    assert serve.stop() == 0


@pytest.mark.parametrize(("name", "number", "trouble"), FAULTS, ids=[f"{n} {s.name}" for n, s, _ in FAULTS])
def test_a_process_that_dies_or_stops_is_replaced(supervised, cases, name, number, trouble):
    """All by itself, on the same port; the client keeps its connection."""
    restarts, pid = len(supervised.events) // 2, process_of(supervised.server, name)
    with Hammer(supervised.url, cases) as clients:
        time.sleep(STABLE_S)  # or the next restart is put off, as in a loop of crashes
        struck = time.monotonic()
        os.kill(pid, number)
        clients.wait_for_failures(struck)
        failed_at = max(at for at, *_ in clients.outcome.failed)
        back = clients.wait_for_answers(failed_at) - struck
        event = supervised.wait_for("restarted", restarts + 1)
    outcome = clients.outcome
    print(f"{name} {number.name}: right answers again after {back:.2f} s, {len(outcome.failed)} requests failed")
    assert outcome.wrong == []
    assert back <= ALLOWED_S
    assert re.fullmatch(rf"{name} \(process {pid}\) {trouble}|tritonserver died with code -9", event["cause"])
    assert event["restarts"] == restarts + 1
    for _, seconds, _, message in outcome.failed:
        assert re.search(r"UNAVAILABLE|INTERNAL|CANCELLED", message), message
        assert seconds <= ALLOWED_S
    assert not is_running(pid), "one that was stopped must not go on later"
    shared = regions_of(supervised.server)
    eventually(lambda: len(regions(shared)) == 4, lambda: regions(shared))


def test_restarts_are_counted_for_prometheus(supervised, metrics_port):
    """By the last server, which was none of the others, and once: a scrape would add up what two models say."""
    deadline, line = time.monotonic() + 60, f"hstu_trt_restarts_total {len(FAULTS)}"
    found = []
    while not found:
        assert time.monotonic() < deadline
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
            found = [text for text in answer.read().decode().splitlines() if text.startswith("hstu_trt_restarts_total")]
        time.sleep(0.1)
    assert found == [line]


def test_restarts_are_recorded(supervised, deployment):
    (record,) = deployment.run.glob(f"restarts-{supervised.url.rpartition(':')[2]}.json")
    document = json.loads(record.read_text())
    assert document["restarts"] == len(FAULTS)
    assert document["events"] == supervised.events[-20:]
    assert all(event["event"] in ("fault", "restarted") for event in document["events"])


def test_a_short_stop_is_only_slow(deployment, cases):
    """Nothing is restarted, and the client sees nothing but a late answer.

    From 1 s on, Triton answers INTERNAL itself ("Stub process is not healthy"), and ends with an abort (2.51) when the
    process goes on: it must be replaced before.
    """
    serve = Serve(deployment, "--no-restart")
    request, expected = cases["ranking"][0]
    hstu = process_of(serve.facts["pid"], "hstu")
    with RankingClient(serve.url) as client, ThreadPoolExecutor() as pool:
        os.kill(hstu, signal.SIGSTOP)
        answer = pool.submit(client.ask, request)
        time.sleep(0.2)
        assert not answer.done()
        os.kill(hstu, signal.SIGCONT)
        assert (answer.result().scores == expected).all()
    assert serve.stop() == 0
