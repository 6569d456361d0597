"""A real tritonserver whose rows come from a real cluster, without a copy of them on its own disk."""

import json
import os
import shutil

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from scraping import series
from waiting import eventually

from hstu_trt.bench.tables.local_cluster import start_cluster
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.tensors import feature_columns
from hstu_trt.serving.answers import ServerError
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.requests import one_user, pack, sample
from hstu_trt.serving.server import Listen, choose_port, find_tritonserver, plan_launch
from hstu_trt.serving.starting import check, start
from hstu_trt.tables.ids import RowStatus
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_push import Push
from hstu_trt.tables.remote_resp import RemoteError

pytestmark = [pytest.mark.triton, pytest.mark.redis, pytest.mark.faults]

MODELS = ("ranking", "ranking_fused")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    started = start_cluster(tmp_path_factory.mktemp("redis"))
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def deployments(exported, servers, tmp_path_factory):
    """(all rows on disk, item rows in the cluster alone, rows in either with something to fall back to): one model."""
    folder = tmp_path_factory.mktemp("deployments")
    whole = assemble(read_model_folder(exported("fp32")), folder / "whole", Options())
    bare = shutil.copytree(exported("fp32"), folder / "model")
    remote = {"tier": "remote", "nodes": list(servers.names), "deadline_ms": 5000}
    settings = folder / "tables.json"
    settings.write_text(
        json.dumps(
            {
                "tables": {
                    "item_id": {**remote, "local_copy": False},
                    "item_category_id": remote,
                    "user_id": {"tier": "resident"},
                }
            }
        )
    )
    remote_only = assemble(read_model_folder(bare), folder / "remote", Options(tiers=settings))
    with pytest.raises(RemoteError, match=r"no complete version of table 'item_c?a?t?.*tables push .* --cluster"):
        check(remote_only)
    with Cluster(ClusterOptions(nodes=servers.names)) as cluster:
        for table in ("item_id", "item_category_id"):
            Push(cluster, bare / "tables", table, "v1").run()
    shutil.rmtree(bare / "tables" / "item_id")
    check(remote_only, hash_tables=True)
    fallen = {"item_id": {**remote, "local_copy": False, "on_failure": "default"}, "item_category_id": remote}
    settings.write_text(json.dumps({"tables": fallen}))
    fallback = assemble(read_model_folder(bare), folder / "fallback", Options(tiers=settings))
    return whole, remote_only, fallback


@pytest.fixture(scope="module")
def served(deployments):
    """The servers' URLs, and the port of the last one's metrics."""
    processes = []
    try:
        for deployment in deployments:
            port = choose_port("127.0.0.1", 0)
            listen = Listen(grpc_port=0, metrics_port=port)
            plan = plan_launch(find_tritonserver(), deployment, listen)
            processes.append(start(deployment, plan)[0])
        yield [*(process.plan.url for process in processes), port]
    finally:
        codes = [process.drain() for process in processes]
    assert codes == [0, 0, 0]


def row_status(url, model, tensors):
    """How many rows of a request came from where."""
    inputs = []
    for name, array in tensors.items():
        dtype = {"int64": "INT64", "int32": "INT32"}[str(array.dtype)]
        tensor = grpc_client.InferInput(name, list(array.shape), dtype)
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        inputs.append(tensor)
    client = grpc_client.InferenceServerClient(url)
    try:
        counts = client.infer(model, inputs).as_numpy("row_status").ravel()
    finally:
        client.close()
    return {status.name: int(counts[status]) for status in RowStatus if counts[status]}


def test_scores_are_those_of_rows_on_disk(deployments, served):
    config, limits = deployments[0].model.ranking_config, deployments[0].model.limits
    for seed in range(3):
        request = sample(config, limits, seed=seed)
        packed = pack(config, [request])
        for model in MODELS:
            scores = []
            for url in served[:3]:
                with RankingClient(url, model) as client:
                    scores.append(client.rank(request.user, request.history, request.candidates))
            np.testing.assert_array_equal(scores[0], scores[1])
            np.testing.assert_array_equal(scores[0], scores[2])
            tensors = packed if model == "ranking" else one_user(packed)
            here, remote, fallback = (row_status(url, model, tensors) for url in served[:3])
            assert fallback == remote
            ids = packed["uih_ids"].size + packed["candidate_ids"].size
            assert remote["REMOTE"] == ids
            assert here["HOST"] == remote["REMOTE"] + remote.get("HOST", 0)


def test_rows_out_of_reach_are_unavailable(deployments, served, servers):
    """From here on the cluster is gone."""
    config, limits = deployments[0].model.ranking_config, deployments[0].model.limits
    request = sample(config, limits)
    for node in servers.nodes:
        node.kill()
    for model in MODELS:
        with RankingClient(served[1], model) as client:
            with pytest.raises(ServerError, match=r"table 'item_id', version 'v1': of .*unavailable") as caught:
                client.rank(request.user, request.history, request.candidates)
            assert "(UNAVAILABLE)" in str(caught.value)
            assert "is the server running" not in str(caught.value)
            assert not any(name in str(caught.value) for name in servers.names), "nodes are not the client's business"
        with RankingClient(served[0], model) as client:
            assert client.rank(request.user, request.history, request.candidates).shape[0]
    log = max(deployments[1].run.glob("triton-*.log"), key=os.path.getmtime)
    eventually(lambda: any(name in log.read_text() for name in servers.names))


def test_rows_out_of_reach_come_from_a_copy_or_are_default_rows(deployments, served):
    """After the cluster is gone: categories are on disk too, items are zeros, and users never were remote."""
    config, limits = deployments[0].model.ranking_config, deployments[0].model.limits
    packed = pack(config, [sample(config, limits)])
    items = config.table_of("item_id").features
    columns = feature_columns(config)
    remote = sum(packed[name].shape[0] * sum(f in items for f in columns[name]) for name in columns)
    rows = sum(packed[name].size for name in columns)
    for model in MODELS:
        tensors = packed if model == "ranking" else one_user(packed)
        assert row_status(served[2], model, tensors) == {"UNAVAILABLE": remote, "HOST": rows - remote}

    def counted(event, lookup):
        events = {key: count for key, count in series(served[3]).items() if key.startswith("hstu_trt_remote_events_")}
        return sum(count for key, count in events.items() if f'"{event}"' in key and f'"{lookup}"' in key)

    for lookup in ("embedding_lookup", "ranking_fused"):
        eventually(lambda lookup=lookup: counted("rows_default", lookup) == remote)
        assert counted("rows_local", lookup) > 0
        assert counted("requests_failed", lookup) == 0


def test_a_server_starts_without_the_cluster_where_it_has_all_rows(deployments, served, servers, exported, tmp_path):
    """As it must to be restarted in an outage. Last of this file."""
    settings = tmp_path / "tables.json"
    settings.write_text(json.dumps({"default": {"tier": "remote", "nodes": list(servers.names)}}))
    covered = assemble(read_model_folder(exported("fp32")), tmp_path / "covered", Options(tiers=settings))
    with pytest.raises(RemoteError, match="refused"):
        check(covered, hash_tables=True)
    check(covered)
    process, _ = start(covered, plan_launch(find_tritonserver(), covered, Listen(grpc_port=0)))
    try:
        config, limits = covered.model.ranking_config, covered.model.limits
        packed = pack(config, [sample(config, limits)])
        rows = sum(packed[name].size for name in feature_columns(config))
        assert row_status(process.plan.url, "ranking", packed) == {"HOST": rows}
    finally:
        process.drain()
