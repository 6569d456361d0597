"""What dies or stops is restarted within 5 s under load, and no answer is ever wrong.

What a client sees: requests on the way fail with UNAVAILABLE or INTERNAL, new ones with UNAVAILABLE until the next
server answers. A client that keeps its connection and asks again needs nothing else.
"""

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hammering import BOTH, Hammer
from scraping import restarts_told
from served import in_process, request_of
from standing_still import asked_while_standing_still, standing_still
from supervised import Supervised, is_running, process_of, regions, regions_of
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
    supervised.wait_until_stable()
    restarts, pid = supervised.count("restarted"), process_of(supervised.server, name)
    with Hammer(supervised.url, cases) as clients:
        clients.wait_for_answers(time.monotonic())
        struck = time.monotonic()
        os.kill(pid, number)
        clients.wait_for_failures(struck)
        failed_at = max(at for at, *_ in clients.outcome.failed)
        back = clients.wait_for_answers(failed_at) - struck
        event = supervised.wait_for("restarted", restarts + 1)
    outcome = clients.outcome
    print(f"{name} {number.name}: right answers again after {back:.2f} s, {len(outcome.failed)} requests failed")
    assert outcome.wrong == []
    assert back <= supervised.allowed_s
    assert re.fullmatch(rf"{name} \(process {pid}\) {trouble}|tritonserver died with code -9", event["cause"])
    assert event["restarts"] == restarts + 1
    for _, seconds, _, message in outcome.failed:
        assert re.search(r"UNAVAILABLE|INTERNAL|CANCELLED", message), message
        assert seconds <= supervised.allowed_s
    eventually(lambda: not is_running(pid), "one that was stopped must not go on later")
    shared = regions_of(supervised.server)
    eventually(lambda: len(regions(shared)) == 4, lambda: regions(shared))


def test_restarts_are_counted_for_prometheus(supervised, metrics_port):
    """By the last server, which was none of the others, and once: a scrape would add up what two models say."""
    assert restarts_told(metrics_port) == [f"hstu_trt_restarts_total {supervised.count('restarted')}"]


def test_restarts_are_recorded(supervised, deployment):
    (record,) = deployment.run.glob(f"restarts-{supervised.url.rpartition(':')[2]}.json")
    document = json.loads(record.read_text())
    assert document["restarts"] == supervised.count("restarted") > 0
    assert document["events"] == supervised.events[-20:]
    assert all(event["event"] in ("fault", "restarted") for event in document["events"])


def test_a_short_stop_is_only_slow(deployment, cases):
    """Nothing is restarted, and the client sees nothing but a late answer."""
    request, expected = cases["ranking"][0]

    def late_answer(serve):
        with RankingClient(serve.url) as client, ThreadPoolExecutor() as pool:
            with standing_still([process_of(serve.facts["pid"], "hstu")]) as stop:
                answer = pool.submit(client.ask, request)
                time.sleep(0.2)
                assert not answer.done()
            stop.require_short()
            return answer.result()

    answer = asked_while_standing_still(deployment, late_answer)
    assert (answer.scores == expected).all()
