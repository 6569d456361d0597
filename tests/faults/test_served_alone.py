"""A server of one model: it answers, is watched, refreshed and released like a server of both, and says what it is."""

import contextlib
import os
import re
import signal
import time

import pytest
from broken_deployments import OFF_BY_A_LITTLE, replace_file
from fleets import Load, answers_in_order
from hammering import Hammer
from scraping import restarts_told
from served import Serve, in_process, request_of
from supervised import Supervised, is_running, process_of
from waiting import eventually

from hstu_trt.bench.tables import refresh_load
from hstu_trt.bench.tables.refresh import plan_steps, run_under_load
from hstu_trt.bench.tables.refresh_versions import Store, rows_that_matter
from hstu_trt.bench.workloads.requests_source import generate_requests
from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import GateError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving import probe
from hstu_trt.serving.answers import ServerError
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient, served_by
from hstu_trt.serving.cuda_steps import CudaSettings
from hstu_trt.serving.deployment import read_deployment
from hstu_trt.serving.models.held import LIVE_FOLDER
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.served import SERVED
from hstu_trt.serving.server import Listen, choose_port, find_tritonserver, plan_launch
from hstu_trt.serving.starting import start
from hstu_trt.serving.supervision.processes import SERVER, processes_of

pytestmark = [pytest.mark.triton, pytest.mark.faults]
STEPS = ("embedding_lookup", "hstu", "mlp_head")
# what is served -> the processes of its models, the first being the one to strike
ALONE = {"ranking_fused": ("ranking_fused",), "ranking": ("hstu", "embedding_lookup", "mlp_head")}
OTHER = {"ranking": "ranking_fused", "ranking_fused": "ranking"}


@pytest.fixture(scope="module")
def model(exported):
    return read_model_folder(exported("fp32"))


@pytest.fixture(scope="module", params=ALONE)
def alone(request, model, tmp_path_factory):
    """(name, deployment, its server under supervision, port of the metrics)"""
    out, port = tmp_path_factory.mktemp("alone") / "deployment", choose_port("127.0.0.1", 0)
    deployment = assemble(model, out, Options(served=(request.param,)))
    server = Supervised(deployment, "--metrics-port", str(port))
    yield request.param, deployment, server, port
    assert server.stop() == 0


def test_it_runs_what_it_serves_and_nothing_else(alone):
    name, _, server, _ = alone
    assert {process.name for process in processes_of(server.server)} == {SERVER, *ALONE[name]}
    assert server.facts["served"] == [name] and name in server.facts["models"]
    assert 0 <= server.facts["canary_difference"] <= 4e-5, "held against ONNX Runtime"


def test_a_client_asks_what_is_served(alone):
    name, deployment, server, _ = alone
    assert served_by(server.url) == (name,)
    request = request_of(deployment, 8, 5)
    with RankingClient(server.url) as client:
        assert client.model == name
        assert client.ask(request).scores == pytest.approx(in_process(deployment, name, request), abs=1e-6)
    said = f"the server at {server.url} serves {name}, not {OTHER[name]}"
    with pytest.raises(ServerError, match=re.escape(said)):
        RankingClient(server.url, OTHER[name])


def test_a_probe_asks_what_is_served(alone, capsys):
    assert probe.main(["--url", alone[2].url]) == 0
    assert capsys.readouterr().out == f"{alone[0]}: right answer\n"


def test_a_model_process_that_dies_is_replaced(alone):
    name, deployment, server, port = alone
    request = request_of(deployment, 64, 40)
    cases = {name: [(request, in_process(deployment, name, request))]}
    server.wait_until_stable()
    pid = process_of(server.server, ALONE[name][0])
    with Hammer(server.url, cases) as clients:
        clients.wait_for_answers(time.monotonic())
        struck = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        clients.wait_for_failures(struck)
        back = clients.wait_for_answers(max(at for at, *_ in clients.outcome.failed)) - struck
        event = server.wait_for("restarted")
    print(f"{name} alone: right answers again after {back:.2f} s, {len(clients.outcome.failed)} requests failed")
    assert clients.outcome.wrong == [] and back <= server.allowed_s
    assert event["cause"] == f"{ALONE[name][0]} (process {pid}) died" and event["restarts"] == 1
    eventually(lambda: not is_running(pid), "it lives on")
    assert restarts_told(port) == ["hstu_trt_restarts_total 1"]


def test_micro_batches_alone(model, tmp_path):
    """Flavour ``cuda``, without a GPU: one process has the model, and no other its tables."""
    options = Options(served=("ranking_fused",), flavour="cuda", cuda=CudaSettings(device="cpu", batch_tokens=256))
    deployment = assemble(model, tmp_path / "deployment", options)
    server = Serve(deployment)
    try:
        assert {process.name for process in processes_of(server.facts["pid"])} == {SERVER, "ranking_fused"}
        assert server.facts["canary_difference"] <= 4e-5
        request = request_of(deployment, 8, 5)
        with RankingClient(server.url) as client:
            expected = in_process(deployment, "ranking_fused", request)
            assert client.ask(request).scores == pytest.approx(expected, abs=1e-5)
    finally:
        server.stop()


def test_a_first_answer_that_is_off_is_refused(model, tmp_path):
    folder = assemble(model, tmp_path / "deployment", Options(served=("ranking",))).path
    replace_file(folder, "models/mlp_head/1/model.py", OFF_BY_A_LITTLE)
    deployment = read_deployment(folder)
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0))
    with pytest.raises(GateError, match=r"ranking and ONNX Runtime disagree by 0\.01 on a sample request"):
        start(deployment, plan)


@pytest.fixture(scope="module")
def workload(model):
    source = generate_requests(model, profile="ci", count=6, seed=1)
    return [source.pack([row]) for row in range(len(source))]


@contextlib.contextmanager
def started(deployment):
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0))
    process, ready = start(deployment, plan)
    try:
        yield process, ready
    finally:
        process.drain()


def test_refreshes_under_load_and_a_start_on_what_was_published(model, workload, tmp_path):
    """All that a server of both takes and refuses; and the next start is held against the version in use then."""
    store = Store(tmp_path / "tables", model, rows_that_matter(model, workload))
    own, steps = store.last, plan_steps(store)
    refresh = RefreshSettings(tables=store.root, poll_s=0.05)
    deployment = assemble(model, tmp_path / "deployment", Options(served=("ranking_fused",), refresh=refresh))
    norm = parse_fixed_norm(deployment.attention_norm)
    versions = [own, *(step.version for step in steps if not step.version.must_be_refused)]
    expected = {version.label: refresh_load.expected_scores(version, workload, norm) for version in versions}
    with started(deployment) as (process, ready):
        assert ready.canary_difference <= 4e-5
        load = refresh_load.Load(process.plan.url, workload, expected, clients=2, models=deployment.served)
        live = deployment.run / LIVE_FOLDER / str(process.pid)
        outcome = run_under_load(deployment, load, steps, live, gap_s=0.15)
    assert outcome.wrong == [] and (outcome.refreshes, outcome.refused) == (10, 2)
    assert outcome.named == set(expected), "every version answered, the model's own first"
    with started(deployment) as (process, ready), RankingClient(process.plan.url) as client:
        assert ready.canary_difference <= 4e-5, "of the version in use, and its own dense weights"
        in_use = (store.root / "CURRENT").read_text().strip()
        assert client.ask_packed(refresh_load.one_user(workload[0])).tables_version.partition("@")[0] == in_use


@pytest.mark.nginx
def test_a_release_takes_no_model_from_those_who_ask_for_it(fleet, deployment, model, tmp_path):
    """Both -> one: refused in words unless told that nobody asks for the other; and back, with no request failed."""
    alone = assemble(model, tmp_path / "alone", Options(served=("ranking_fused",)))
    both = Load(fleet.url, {"both": deployment})
    one = Load(fleet.url, {"both": deployment}, models=("ranking_fused",))
    with both:
        both.wait_for_more()
        code, _, said = fleet.command("release", "--deployment", alone.path)
        both.wait_for_more()
    assert code == 1 and "serves ranking_fused alone, and this fleet ranking too" in said
    assert "--served ranking,ranking_fused" in said and "--drop ranking" in said
    assert set(answers_in_order(both)) == {"both"}, "nothing has changed"
    with one:
        one.wait_for_more()
        code, out, said = fleet.command("release", "--deployment", alone.path, "--drop", "ranking")
        assert code == 0, said
        assert "2 new replicas answer to requests for ranking_fused" in out
        one.wait_for_more()
        assert fleet.status()["current"]["served"] == ["ranking_fused"]
        with pytest.raises(ServerError, match="serves ranking_fused, not ranking"):
            RankingClient(fleet.url, "ranking")
        code, _, said = fleet.command("release", "--rollback")
        assert code == 0, said
        one.wait_for_more()
    assert set(answers_in_order(one)) == {"both"}, "of the same model: no request failed on the way, nor back"
    assert fleet.status()["current"]["served"] == list(SERVED)
    with both:
        both.wait_for_more()
    assert set(answers_in_order(both)) == {"both"}


@pytest.mark.nginx
def test_a_client_of_a_dropped_model_learns_why(fleet, model, deployment, tmp_path):
    """One that was connected while it was served, and asks on."""
    alone = assemble(model, tmp_path / "alone", Options(served=("ranking_fused",)))
    request = request_of(deployment, 8, 5)
    with RankingClient(fleet.url, "ranking") as client:
        client.ask(request)
        code, _, said = fleet.command("release", "--deployment", alone.path, "--drop", "ranking")
        assert code == 0, said
        with pytest.raises(ServerError, match=r"ranking at .*NOT_FOUND.*a client for what is served finds it"):
            client.ask(request)
        code, out, said = fleet.command("release", "--rollback")
        assert code == 0 and "fail from now on" not in out, said
        client.ask(request)
