"""More load than a deployment can serve: refused at once, accepted in time, nothing lost, and over when it is over."""

import re
from concurrent.futures import Future
from functools import partial

import numpy as np
import pytest
from scraping import series
from served import Serve, in_process, request_of
from standing_still import asked_while_standing_still, standing_still
from waiting import eventually, holds_eventually, settled

from hstu_trt.bench.load.client import ClosedLoop, OpenLoop
from hstu_trt.bench.load.process_watch import usage
from hstu_trt.bench.load.processes import Clients
from hstu_trt.bench.load.stats import SHED, summarise
from hstu_trt.bench.load.target import TritonAddress
from hstu_trt.bench.serving.overload_load import ask_over_connections, split
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.answers import ServerError, inputs_of
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import OverloadedError, RankingClient
from hstu_trt.serving.refresh.settings import DEFAULT_POLL_S
from hstu_trt.serving.requests import one_user, pack
from hstu_trt.serving.server import choose_port
from hstu_trt.serving.signature import OVERLOADED
from hstu_trt.serving.supervision.processes import SERVER, processes_of

pytestmark = [pytest.mark.triton, pytest.mark.faults]

PLACES = 4
MODELS = ("ranking", "ranking_fused")
IN_FLIGHT = {"ranking": PLACES + 3, "ranking_fused": 2 * PLACES}
"""Those that wait, and one in each step, or a batch of as many."""
SENT = 40
"""While models stand still: few, since that may not last long."""
TOLD_S = 2.5 * DEFAULT_POLL_S
"""By then the models have brought their metrics up to date."""


@pytest.fixture(scope="module")
def narrow(exported, tmp_path_factory):
    """A deployment in which few may wait."""
    folder = read_model_folder(exported("fp32"))
    return assemble(folder, tmp_path_factory.mktemp("overload") / "narrow", Options(queue=PLACES))


@pytest.fixture(scope="module")
def metrics_port():
    return choose_port("127.0.0.1", 0)


@pytest.fixture(scope="module")
def server(narrow, metrics_port):
    # Without the supervisor, whose canaries count too.
    server = Serve(narrow, "--metrics-port", str(metrics_port), "--no-restart")
    yield server
    assert server.stop() == 0


def note(future, result, error):
    future.set_result(error if error is not None else result)


def packed(deployment, model, seed=0, events=100, items=20):
    tensors = pack(deployment.model.ranking_config, [request_of(deployment, events, items, seed)])
    return one_user(tensors) if model == "ranking_fused" else tensors


def flood(server, deployment, model, requests):
    """All requests at once; the records and the answers' scores by position."""
    feeds = [pack(deployment.model.ranking_config, [request_of(deployment, 100, 20, seed)]) for seed in range(8)]
    with Clients(TritonAddress(url=server.url, model=model), feeds) as clients:
        return clients.run(OpenLoop(offsets_s=np.zeros(requests), most_waiting=1 << 20))


@pytest.mark.parametrize("model", MODELS)
def test_a_flood_is_refused_but_for_what_may_wait(server, narrow, model):
    records = flood(server, narrow, model, 300)
    found = summarise(records)
    assert not found.errors and SHED in found.flags
    assert 0 < found.shed < 300 and len(records.shed) == found.shed
    answered = split(records, 0, 60).accepted_ms
    assert len(answered) == 300 - found.shed >= IN_FLIGHT[model]


@pytest.mark.parametrize("model", MODELS)
def test_as_many_are_taken_in_as_have_places_and_the_rest_is_refused_before_any_model_sees_it(narrow, model):
    """The models' processes stand still: who is refused then was refused by the server itself, and nobody else is."""
    feed = packed(narrow, model)
    # The two threads of the server that take requests in may let one more in each.
    refused = range(SENT - IN_FLIGHT[model] - 2, SENT - IN_FLIGHT[model] + 1)

    def fill(server):
        stubs = [process.pid for process in processes_of(server.facts["pid"]) if process.name != SERVER]
        assert len(stubs) == 4
        with RankingClient(server.url, model) as client:
            expected = client.infer(feed)
            with standing_still(stubs) as stop:
                futures = [client._send(feed) for _ in range(SENT)]
                stop.wait_for(lambda: sum(future.done() for future in futures) in refused)
            failed = [future for future in futures if future.exception(60) is not None]
            stop.require_short()
            return expected, futures, failed

    expected, futures, failed = asked_while_standing_still(narrow, fill)
    assert len(failed) in refused
    assert {type(future.exception()) for future in failed} == {OverloadedError}
    for future in futures:
        if future not in failed:
            np.testing.assert_allclose(future.result().as_numpy("preds"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_refusals_do_not_wait_for_answers(server, narrow, model):
    """The promise is "at once"; half of them, on any machine, in less time than half of the answers take."""
    records = flood(server, narrow, model, 300)
    parts = split(records, 0, 60)
    assert len(parts.refused_ms) and np.median(parts.refused_ms) < np.median(parts.accepted_ms)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("how", ["given up", "wrong"])
def test_requests_that_end_otherwise_give_their_places_back(server, narrow, model, how):
    """Those whose clients went away, and those that Triton refuses; many times more than there are places."""
    feed, given_up = packed(narrow, model), []
    inputs = inputs_of(feed)
    with RankingClient(server.url, model) as client:
        client.infer(feed)
        for _ in range(10 * PLACES):
            if how == "given up":
                given_up.append(Future())
                client._client.async_infer(model, inputs, partial(note, given_up[-1])).cancel()
            else:
                bad = {name: array for name, array in feed.items() if name != "candidate_ids"}
                with pytest.raises(InputError, match="candidate_ids"):
                    client._receive(client._send(bad))

        # Some are answered, or refused, before.
        cancelled = sum("CANCELLED" in str(future.result(60)) for future in given_up)
        assert cancelled > PLACES if given_up else how == "wrong"

        def all_free():
            futures = [client._send(feed) for _ in range(IN_FLIGHT[model])]
            return all(future.exception(60) is None for future in futures)

        eventually(all_free)


@pytest.mark.parametrize("model", MODELS)
def test_the_client_tells_too_much_load_from_other_errors(server, narrow, model):
    """Requests are sent until one is refused; a wrong request is not called overload, whatever the load."""
    refused = []
    with RankingClient(server.url, model) as client:
        feed = packed(narrow, model)
        for _ in range(20):
            futures = [client._send(feed) for _ in range(100)]
            for future in futures:
                try:
                    client._receive(future)
                except ServerError as error:
                    refused.append(error)
            if refused:
                break
        assert refused and {type(error) for error in refused} == {OverloadedError}
        assert f"{OVERLOADED}{PLACES} requests wait already" in str(refused[0])
        wrong = dict(feed, candidate_ids=np.full_like(feed["candidate_ids"], 10**9))
        with pytest.raises(InputError, match="candidate_ids"):
            client.infer(wrong)


@pytest.mark.parametrize("model", MODELS)
def test_answers_under_overload_are_right(server, narrow, model):
    expected = [in_process(narrow, model, request_of(narrow, 60, 9, seed)) for seed in range(6)]
    right = refused = 0
    with RankingClient(server.url, model) as client:
        feeds = [packed(narrow, model, seed, 60, 9) for seed in range(6)]
        futures = [(n % 6, client._send(feeds[n % 6])) for n in range(240)]
        for seed, future in futures:
            try:
                scores = client._receive(future)
            except OverloadedError:
                refused += 1
                continue
            assert np.abs(scores.reshape(expected[seed].shape) - expected[seed]).max() <= 1e-5
            right += 1
    assert right > 0 and right + refused == 240


@pytest.mark.parametrize("model", MODELS)
def test_wrong_requests_do_not_take_the_places_of_good_ones(server, narrow, model):
    """Whatever is refused before ``hstu`` must not count as being on its way there."""
    with RankingClient(server.url, model) as client:
        feed = packed(narrow, model)
        wrong = dict(feed, candidate_ids=np.full_like(feed["candidate_ids"], 10**9))
        for _ in range(50):
            with pytest.raises(InputError):
                client.infer(wrong)
            client.infer(feed)


@pytest.mark.parametrize("model", MODELS)
def test_a_burst_on_an_idle_server_does_not_stall(server, narrow, model):
    """Triton's own bound made bursts wait for a timer of 500 ms, half of ten bursts or more."""
    feed = [pack(narrow.model.ranking_config, [request_of(narrow, 20, 5)])]
    with Clients(TritonAddress(url=server.url, model=model), feed) as clients:
        clients.run(ClosedLoop(in_flight=1, requests=5))
        slowest = []
        for _ in range(10):
            records = clients.run(OpenLoop(offsets_s=np.zeros(PLACES), most_waiting=100))
            slowest.append(float(np.nanmax(records.done - records.sent)))
            assert not records.errors
    assert np.median(slowest) < 0.4


def test_a_thousand_connections_are_answered_or_refused(server, narrow):
    pid = server.facts["pid"]
    address = TritonAddress(url=server.url, model="ranking")
    target = address.open()
    prepared = [target.prepare(packed(narrow, "ranking", seed)) for seed in range(4)]
    ask_over_connections(server.url, prepared, 50, 60)
    before = usage(pid)
    found = ask_over_connections(server.url, prepared, 1000, 60)
    target.close()
    assert found.failed == {} and found.answered + found.shed == 1000 and found.answered > 0

    def left():
        return usage(pid).handles - before.handles

    eventually(lambda: left() <= 20, lambda: f"{left()} handles left of 1000 connections")
    assert usage(pid).processes == before.processes
    with RankingClient(server.url) as client:
        client.infer(packed(narrow, "ranking"))


def total(found, name, **labels):
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(value for key, value in found.items() if re.match(rf"{name}\b", key) and all(w in key for w in wanted))


@pytest.mark.parametrize(("model", "door"), [("ranking", "embedding_lookup"), ("ranking_fused", "ranking_fused")])
def test_shed_load_and_batches_are_in_the_metrics(server, narrow, metrics_port, model, door):
    names = ("shed", "batches", "batch_tokens", "batch_seconds", "begun")
    steps = ("embedding_lookup", "hstu", "mlp_head") if model == "ranking" else (model,)

    def read():
        found = series(metrics_port)
        triton = total(found, "nv_inference_request_failure", model=model)
        waited = sum(total(found, "nv_inference_queue_duration_us", model=step) for step in steps)
        return np.array([*(total(found, f"hstu_trt_{name}_total", model=door) for name in names), waited, triton])

    before = settled(read, TOLD_S)
    records = flood(server, narrow, model, 200)
    shed, answered = len(records.shed), 200 - len(records.errors)

    def all_told():
        added = read() - before
        assert added[0] == shed > 0 and added[2] == answered * 120
        assert 0 < added[1] <= answered and added[3] > 0 and added[4] == answered and added[5] > 0
        # Triton's own counters do not tell shed load: what it never saw it does not count.
        assert added[6] == 0

    holds_eventually(all_told)
    settled(read, TOLD_S)
    all_told()
