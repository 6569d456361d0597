"""More load than a deployment can serve: refused at once, accepted in time, nothing lost, and over when it is over."""

import os
import re
import signal
import urllib.request

import numpy as np
import pytest
from served import Serve, in_process, request_of
from waiting import eventually, holds_eventually, settled

from hstu_trt.bench.load.client import ClosedLoop, OpenLoop, Records
from hstu_trt.bench.load.process_watch import family, usage
from hstu_trt.bench.load.processes import Clients
from hstu_trt.bench.load.stats import SHED, summarise
from hstu_trt.bench.load.target import TritonAddress
from hstu_trt.bench.result_rows import read_rows
from hstu_trt.bench.serving import overload
from hstu_trt.bench.serving.overload_load import answers_per_s, ask_over_connections, recovery_s, split
from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.answers import ServerError
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
"""While models stand still: few, since Triton gives models up that stand still for a second."""
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
def test_as_many_are_taken_in_as_have_places_and_the_rest_is_refused_before_any_model_sees_it(server, narrow, model):
    """The models' processes stand still: who is refused then was refused by the server itself, and nobody else is."""
    feed = packed(narrow, model)
    stubs = [process.pid for process in processes_of(server.facts["pid"]) if process.name != SERVER]
    assert len(stubs) == 4
    with RankingClient(server.url, model) as client:
        expected = client.infer(feed)
        for stub in stubs:
            os.kill(stub, signal.SIGSTOP)
        try:
            futures = [client._send(feed) for _ in range(SENT)]
            # The two threads of the server that take requests in may let one more in each.
            refused = range(SENT - IN_FLIGHT[model] - 2, SENT - IN_FLIGHT[model] + 1)
            eventually(lambda: sum(future.done() for future in futures) in refused)
        finally:
            for stub in stubs:
                os.kill(stub, signal.SIGCONT)
        answers = [future.result() for future in futures if future.exception(60) is None]
        assert SENT - len(answers) in refused
        for answer in answers:
            np.testing.assert_allclose(answer.as_numpy("preds"), expected, atol=1e-5, rtol=0)


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
    feed = packed(narrow, model)
    with RankingClient(server.url, model) as client:
        client.infer(feed)
        for _ in range(10 * PLACES):
            if how == "given up":
                client._send(feed).cancel()
            else:
                bad = {name: array for name, array in feed.items() if name != "candidate_ids"}
                with pytest.raises(InputError, match="candidate_ids"):
                    client._receive(client._send(bad))

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


def metrics(port):
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}


def total(found, name, **labels):
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(value for key, value in found.items() if re.match(rf"{name}\b", key) and all(w in key for w in wanted))


@pytest.mark.parametrize(("model", "door"), [("ranking", "embedding_lookup"), ("ranking_fused", "ranking_fused")])
def test_shed_load_and_batches_are_in_the_metrics(server, narrow, metrics_port, model, door):
    names = ("shed", "batches", "batch_tokens", "batch_seconds", "begun")
    steps = ("embedding_lookup", "hstu", "mlp_head") if model == "ranking" else (model,)

    def read():
        found = metrics(metrics_port)
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


def test_a_run_under_overload_is_measured_and_written_down(exported, tmp_path, capsys, monkeypatch):
    """The whole verb, short. Its bounds on time are for a quiet machine: the rows tell which were kept.

    A toy model is no measure of speed under overload: refusing a request costs about what serving one does, on the
    same two cores as the client, so only what holds on any machine is asserted.
    """
    deployment = assemble(read_model_folder(exported("fp32")), tmp_path / "deployment", Options())
    out = tmp_path / "rows.jsonl"
    core, parted = str(min(os.sched_getaffinity(0))), []
    monkeypatch.setattr(overload, "pin", lambda processes, cpus: parted.append((set(processes), cpus)))
    argv = ["--deployment", str(deployment.path), "--seconds", "2", "--connections", "100", "--out", str(out)]
    argv += ["--clients", "2", "--server-cpus", core, "--client-cpus", core]
    code = overload.main([*argv, "--refusal-ms", "2000", "--commit", "abc"])
    rows = read_rows([out])
    assert [row.variant for row in rows] == [f"{model} at 3 x peak" for model in MODELS]
    assert code == (1 if any(row.details["missed"] for row in rows) else 0)
    (server, its_cores), (client, our_cores) = parted
    assert client == {os.getpid()} and not server & client and len(server) > 4
    assert its_cores == our_cores == {int(core)}
    for row in rows:
        checks, setting = row.checks, row.details["setting"]
        assert (setting["clients"], setting["server_cpus"], setting["client_cpus"]) == (2, core, core)
        assert checks["failed"] == 0 and checks["refused"] > 0 and checks["accepted"] > 0
        assert checks["connections_answered"] + checks["connections_shed"] == 100
        assert checks["throughput_share"] > 0.2 and checks["memory_growth"] < 0.5
    assert "throughput_share" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "127.0.0.1:1"], "--url and --server-pid go together"),
        (["--server-pid", "1"], "--url and --server-pid go together"),
        (["--clients", "0"], "an overload run needs"),
        (["--client-cpus", "none"], "write them as 0-7,12"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        overload.main(["--deployment", str(tmp_path), *options])


def records(done, errors, *, rate=100.0):
    due = np.arange(len(done)) / rate
    return Records(
        due=due, sent=due, done=due + np.asarray(done), which=np.zeros(len(done), int), errors=errors, cpu_s=0.0
    )


def test_accepted_refused_and_failed_requests_are_told_apart():
    shed, broken = f"UNAVAILABLE: {OVERLOADED}4 requests wait already", "INTERNAL: broken"
    found = records(np.full(400, 0.02), {n: shed for n in range(0, 200, 2)} | {3: broken, 301: broken})
    parts = split(found, 0.0, 2.0)
    assert (len(parts.accepted_ms), len(parts.refused_ms), parts.failed) == (99, 100, {broken: 1})
    assert answers_per_s(found, 0.0, 2.02) == pytest.approx(99 / 2.02)
    result = summarise(found)
    assert result.shed == 100 and result.errors == {broken: 2} and set(result.flags) >= {SHED, "errors"}


@pytest.mark.parametrize(
    ("slow_until", "shed_until", "recovered"),
    [(0, 0, 0.0), (240, 0, 0.5), (0, 251, 0.75), (400, 0, float("inf"))],
    ids=["at once", "slow for a while", "refused for a while", "never"],
)
def test_recovery_counts_from_the_end_of_the_burst(slow_until, shed_until, recovered):
    """100 requests per second, the burst ends after 2 s; normal is 10 ms."""
    latency = np.where(np.arange(400) < slow_until, 0.5, 0.01)
    shed = {n: f"UNAVAILABLE: {OVERLOADED}" for n in range(200, shed_until)}
    assert recovery_s(records(latency, shed), 2.0, 20.0) == recovered


def test_a_family_of_processes_is_found_and_counted():
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1, text=True)
    assert child.stdout.readline() == "up\n"
    assert {os.getpid(), child.pid} <= set(family(os.getpid()))
    alone, both = usage(child.pid), usage(os.getpid())
    assert alone.processes == 1 and alone.handles >= 3 and alone.threads >= 1 and alone.memory_bytes > 1e6
    assert both.processes >= 2 and both.memory_bytes > alone.memory_bytes
    child.communicate("\n", timeout=10)
    assert usage(child.pid).processes == 0
