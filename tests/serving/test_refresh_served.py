"""A running server follows what is published: no request fails, none is mixed, and what is wrong is refused."""

import json
import os
import re

import numpy as np
import pytest
from scraping import series
from waiting import holds_eventually

from hstu_trt.bench.tables.refresh import PHASES, POLL_S, plan_steps, run_under_load
from hstu_trt.bench.tables.refresh_load import Load, check_tellable, expected_scores, wait_for
from hstu_trt.bench.tables.refresh_versions import Store, rows_that_matter
from hstu_trt.bench.workloads.requests_source import generate_requests
from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.cli import main as cli
from hstu_trt.contract.errors import GateError, InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.models.held import LIVE_FOLDER
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.requests import one_user
from hstu_trt.serving.server import Listen, choose_port, find_tritonserver, plan_launch
from hstu_trt.serving.starting import start

pytestmark = pytest.mark.triton
MODELS = ("ranking", "ranking_fused")


@pytest.fixture(scope="module")
def requests(model):
    source = generate_requests(model, profile="ci", count=6, seed=1)
    return [source.pack([row]) for row in range(len(source))]


@pytest.fixture(scope="module")
def model(exported):
    return read_model_folder(exported("fp32"))


@pytest.fixture(scope="module")
def store(model, requests, tmp_path_factory):
    return Store(tmp_path_factory.mktemp("refresh"), model, rows_that_matter(model, requests))


@pytest.fixture(scope="module")
def own(store):
    """The tables that the model was exported with, as a version."""
    return store.last


@pytest.fixture(scope="module")
def steps(store, own):
    return plan_steps(store)


@pytest.fixture(scope="module")
def server(model, store, own):
    """A server with metrics: (deployment, url, port of the metrics, folder of what it says it serves)."""
    settings = RefreshSettings(tables=store.root, poll_s=POLL_S)
    deployment = assemble(model, store.root.parent / "deployment", Options(refresh=settings))
    port = choose_port("127.0.0.1", 0)
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0, metrics_port=port))
    process, _ = start(deployment, plan)
    yield deployment, plan.url, port, deployment.run / LIVE_FOLDER / str(process.pid)
    process.drain()
    assert not list((deployment.run / LIVE_FOLDER).iterdir()), "what a server serves is forgotten when it ends"


def metrics_of(port):
    found = {}
    for key, value in series(port).items():
        name, _, labels = key.partition("{")
        found[name, tuple(sorted(re.findall(r'(\w+)="([^"]*)"', labels)))] = value
    return found


def sum_of(metrics, name, **labels):
    return sum(
        value for (found, has), value in metrics.items() if found == name and labels.items() <= dict(has).items()
    )


def test_nothing_is_published_yet(server, own, requests):
    for name in MODELS:
        with RankingClient(server[1], name) as client:
            answer = client.ask_packed(requests[0] if name == "ranking" else one_user(requests[0]))
        assert answer.tables_version == own.label
        rows = sum(requests[0][ids].size for ids in ("uih_ids", "candidate_ids", "contextual_ids"))
        assert answer.rows == {"host": rows}


def test_ten_refreshes_under_load(server, steps, own, requests):
    """Whole tables, deltas, the way back, new dense weights; a damaged version and one of another pair are refused."""
    deployment, url, port, live = server
    norm = parse_fixed_norm(deployment.attention_norm)
    versions = {step.version.label: step.version for step in steps if not step.version.must_be_refused}
    expected = {label: expected_scores(version, requests, norm) for label, version in versions.items()}
    expected[own.label] = expected_scores(own, requests, norm)
    check_tellable(expected)
    before = metrics_of(port)
    outcome = run_under_load(deployment, Load(url, requests, expected, clients=2), steps, live, gap_s=0.15)
    assert outcome.wrong == []
    assert (outcome.refreshes, outcome.refused) == (10, 2)
    assert outcome.named == set(expected), "every version answered, the model's own first"
    for model in MODELS:
        for phase in PHASES:
            if len(figures := outcome.latencies_ms(model, phase)):  # a phase may be shorter than a request
                print(f"{model}: p99 of {len(figures)} {np.percentile(figures, 99):.1f} ms {phase}")
    holds_eventually(lambda: check_metrics(before, metrics_of(port), steps[-1].version.label))

    def check_log():
        log = plan_log(deployment)
        assert re.search(r"embedding_lookup: refused foreign.*belongs to the dense weights 0000", log)
        assert re.search(r"ranking_fused: refused damaged.*does not match the sha256", log)

    holds_eventually(check_log)


def plan_log(deployment):
    return max(deployment.run.glob("triton-*.log"), key=os.path.getmtime).read_text()


def check_metrics(before, after, label):
    for model in ("embedding_lookup", "ranking_fused"):
        for result, count in (("ok", 10), ("refused", 2)):
            counts = [
                sum_of(found, "hstu_trt_refreshes_total", model=model, result=result) for found in (before, after)
            ]
            assert counts[1] - counts[0] == count
        assert sum_of(after, "hstu_trt_tables_info", model=model, tables_version=label) == 1
        assert sum_of(after, "hstu_trt_tables_info", model=model) == 1, "earlier versions are at 0"
        assert sum_of(after, "hstu_trt_tables_since_seconds", model=model) > 1e9
        assert sum_of(after, "hstu_trt_refresh_seconds", model=model) > 0
        rows = [sum_of(found, "hstu_trt_table_rows_total", model=model, status="host") for found in (before, after)]
        assert rows[1] > rows[0]


@pytest.mark.parametrize("name", MODELS)
def test_bad_ids_are_counted_by_table(server, requests, name):
    port, bad = server[2], requests[0] | {"candidate_ids": requests[0]["candidate_ids"] + 10**6}
    with RankingClient(server[1], name) as client, pytest.raises(InputError, match="'candidate_ids'"):
        client.infer(bad if name == "ranking" else one_user(bad))
    model = "embedding_lookup" if name == "ranking" else name

    def check():
        assert sum_of(metrics_of(port), "hstu_trt_tables_bad_ids_total", model=model, table="item_id") > 0

    holds_eventually(check)


def test_command_line_publishes_and_rolls_back(server, store, steps, requests, capsys):
    """``tables publish`` and ``tables rollback`` are all that it takes."""
    live, folder = server[3], server[0].versions
    versions = {step.version.name: step.version for step in steps}
    for name in ("v2", "v7"):
        assert cli(["tables", "publish", str(folder / name)]) == 0
        wait_for(live, versions[name])
    assert cli(["tables", "rollback", str(folder)]) == 0
    wait_for(live, versions["v2"])
    assert "uses v2" in capsys.readouterr().out
    with RankingClient(server[1]) as client:
        assert client.ask_packed(requests[0]).tables_version == versions["v2"].label


def test_a_server_starts_with_what_is_published(model, store, steps, requests, server):
    """A delta of other dense weights than the deployment's: both are found beside it."""
    versions = {step.version.name: step.version for step in steps}
    assert cli(["tables", "publish", str(store.root / "d6")]) == 0
    settings = RefreshSettings(tables=store.root, poll_s=POLL_S)
    deployment = assemble(model, store.root.parent / "second", Options(refresh=settings))
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0))
    process, _ = start(deployment, plan)
    try:
        norm = parse_fixed_norm(deployment.attention_norm)
        (expected,) = expected_scores(versions["d6"], requests[:1], norm)
        with RankingClient(plan.url) as client:
            answer = client.ask_packed(requests[0])
        assert answer.tables_version == versions["d6"].label
        assert np.abs(answer.scores - expected).max() < 1e-5
    finally:
        process.drain()


def test_a_server_starts_with_the_version_before_a_bad_one(model, store, steps, requests, server, capsys):
    """Where the deployment says so; rows, dense weights and metrics tell it."""
    versions = {step.version.name: step.version for step in steps}
    for name in ("v7", "v2"):
        assert cli(["tables", "publish", str(store.root / name)]) == 0
    damaged = next(name for name, version in versions.items() if version.must_be_refused)
    (store.root / "CURRENT").write_text(f"{damaged}\n")
    settings = RefreshSettings(tables=store.root, poll_s=POLL_S, bad_version="previous")
    deployment = assemble(model, store.root.parent / "third", Options(refresh=settings))
    port = choose_port("127.0.0.1", 0)
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0, metrics_port=port))
    process, _ = start(deployment, plan)
    try:
        norm = parse_fixed_norm(deployment.attention_norm)
        (expected,) = expected_scores(versions["v7"], requests[:1], norm)
        with RankingClient(plan.url) as client:
            answer = client.ask_packed(requests[0])
        assert answer.tables_version == versions["v7"].label
        assert np.abs(answer.scores - expected).max() < 1e-5

        def check():
            found = metrics_of(port)
            for name in ("embedding_lookup", "ranking_fused"):
                assert sum_of(found, "hstu_trt_tables_instead_of_current", model=name) == 1
                assert sum_of(found, "hstu_trt_refreshes_total", model=name, result="refused") == 1

        holds_eventually(check)
    finally:
        process.drain()
        assert cli(["tables", "publish", str(store.root / "v7")]) == 0


def test_the_check_of_the_load_can_fail(server, requests, own):
    """Scores of another version than the one that is named count as mixed."""
    deployment, url, _, live = server
    wrong = {json.loads((live / f"{name}.json").read_text())["tables_version"] for name in ("ranking_fused",)}
    zeros = [np.zeros((len(request["candidate_timestamps"]), 1), np.float32) for request in requests]
    load = Load(url, requests, {label: zeros for label in wrong}, clients=1)
    outcome = run_under_load(deployment, load, [], live, gap_s=0.3)
    assert outcome.wrong
    assert all(line.endswith("mixed") for line in outcome.wrong)
    with pytest.raises(GateError, match="cannot be told apart"):
        check_tellable({"a": zeros, "b": zeros})
