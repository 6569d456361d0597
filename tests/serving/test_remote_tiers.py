"""A real tritonserver whose rows come from a real cluster, without a copy of them on its own disk."""

import json
import shutil

import numpy as np
import pytest
import tritonclient.grpc as grpc_client

from hstu_trt.bench.local_cluster import start_cluster
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient, ServerError
from hstu_trt.serving.requests import one_user, pack, sample
from hstu_trt.serving.serve import check, start
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch
from hstu_trt.tables.ids import RowStatus
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_push import Push
from hstu_trt.tables.remote_resp import RemoteError

pytestmark = [pytest.mark.triton, pytest.mark.redis]

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
    """(all rows on disk, item rows in the cluster alone): the same model twice."""
    folder = tmp_path_factory.mktemp("deployments")
    whole = assemble(read_model_folder(exported("fp32")), folder / "whole", Options())
    bare = shutil.copytree(exported("fp32"), folder / "model")
    remote = {"tier": "remote", "nodes": list(servers.names), "deadline_ms": 500}
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
    return whole, remote_only


@pytest.fixture(scope="module")
def served(deployments):
    """The servers' URLs."""
    processes = []
    try:
        for deployment in deployments:
            listen = Listen(grpc_port=0)
            plan = plan_launch(find_tritonserver(), deployment.repository, deployment.run, listen)
            processes.append(start(deployment, plan)[0])
        yield [process.plan.url for process in processes]
    finally:
        codes = [process.drain() for process in processes]
    assert codes == [0, 0]


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
            for url in served:
                with RankingClient(url, model) as client:
                    scores.append(client.rank(request.user, request.history, request.candidates))
            np.testing.assert_array_equal(scores[0], scores[1])
            tensors = packed if model == "ranking" else one_user(packed)
            here, remote = (row_status(url, model, tensors) for url in served)
            ids = packed["uih_ids"].size + packed["candidate_ids"].size
            assert remote["REMOTE"] == ids
            assert here["HOST"] == remote["REMOTE"] + remote.get("HOST", 0)


def test_rows_out_of_reach_are_unavailable(deployments, served, servers):
    """Last of this file: the cluster forgets its rows."""
    config, limits = deployments[0].model.ranking_config, deployments[0].model.limits
    request = sample(config, limits)
    for node in servers.nodes:
        node.kill()
    for model in MODELS:
        with RankingClient(served[1], model) as client:
            with pytest.raises(ServerError, match=r"table 'item_id', version 'v1': of .*unavailable") as caught:
                client.rank(request.user, request.history, request.candidates)
            assert "is the server running" not in str(caught.value)
        with RankingClient(served[0], model) as client:
            assert client.rank(request.user, request.history, request.candidates).shape[0]
