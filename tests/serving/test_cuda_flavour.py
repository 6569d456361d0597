"""The flavour ``cuda``: what assemble writes and refuses, and its models in a real server, on the device ``cpu``."""

import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scraping
from served import Serve, in_process, request_of
from waiting import eventually

from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.serving import lint, pbtxt
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import OverloadedError, RankingClient
from hstu_trt.serving.cuda_steps import CudaSettings
from hstu_trt.serving.models.cuda_stages import FusedRequests, OwnTables
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.requests import one_user, pack
from hstu_trt.serving.server import LOOPBACK, choose_port
from hstu_trt.tables.ids import RowStatus

CPU = CudaSettings(device="cpu", batch_tokens=256)
STEPS = ("embedding_lookup", "hstu", "mlp_head")


def test_steps_are_on_the_gpu(make_model, tmp_path):
    deployment = assemble(make_model(precision="fp16"), tmp_path / "out", Options(flavour="cuda"))
    configs = pbtxt.read_repository(deployment.repository)
    for name in (*STEPS, FUSED):
        (group,) = configs[name].instance_group
        assert (group.kind, list(group.gpus), group.count) == (group.KIND_GPU, [0], 1)
        assert configs[name].backend == "python" and pbtxt.parameter(configs[name], "device") == "cuda"
        text = (deployment.repository / name / "1" / "model.py").read_text()
        assert "serving.models.cuda_models" in text and "export" not in text
        inputs = {port.name for port in configs[name].input}
        assert "dense_id" not in inputs and ("attention_norm" in inputs) == (name == "hstu")
    assert all(pbtxt.parameter(configs[name], "FORCE_CPU_ONLY_INPUT_TENSORS") == "no" for name in STEPS)
    assert not lint.lint(deployment.repository, deployment.model, "cuda")
    assert [pbtxt.parameter(configs[name], "queue") for name in ("embedding_lookup", FUSED)] == ["8", "32"]


def test_as_many_may_wait_as_asked_for(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "out", Options(flavour="cuda", cuda=CPU, queue=5))
    configs = pbtxt.read_repository(deployment.repository)
    assert {pbtxt.parameter(configs[name], "queue") for name in ("embedding_lookup", FUSED)} == {"5"}
    assert not lint.lint(deployment.repository, deployment.model, "cuda")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (lambda path: {"tiers": path}, "--tiers: the flavour cuda holds the model's own tables"),
        (lambda path: {"refresh": RefreshSettings(tables=path)}, "--tables and --refresh: the flavour cuda"),
        (lambda path: {"refresh": RefreshSettings(mode="overlay")}, "take --flavour cpu to follow"),
        (lambda path: {"flavour": "cpu", "cuda": CPU}, "go with --flavour cuda"),
    ],
)
def test_what_the_flavour_does_not_do(tmp_path, options, text):
    with pytest.raises(ConfigError, match=text):
        Options(**{"flavour": "cuda", **options(tmp_path)})


@pytest.mark.parametrize("settings", [{"device": "tpu"}, {"batch_tokens": 0}, {"batches_in_flight": 0}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ConfigError):
        CudaSettings(**settings)


def fused_request(model, ids):
    """Two users with two events and one candidate each; ``ids`` is the second event's post id of the second user."""
    config = model.ranking_config
    request = {
        "uih_ids": np.ones((2, 2 * len(config.uih_features)), np.int64),
        "candidate_ids": np.ones((2, len(config.candidate_features)), np.int64),
        "contextual_ids": np.ones((2, len(config.contextual_slots)), np.int64),
        "uih_timestamps": np.ones((2, 2), np.int64),
        "uih_actions": np.zeros((2, 2), np.int64),
        "candidate_timestamps": np.full((2, 1), 9),
    }
    request["uih_ids"][1, len(config.uih_features)] = ids
    return request


@pytest.mark.parametrize(("policy", "given", "expected"), [("clamp", 99, 8), ("clamp", -3, 0), ("row0", 99, 0)])
def test_bad_ids_take_the_policys_row(make_model, policy, given, expected):
    model = make_model()
    tables = OwnTables(model, policy)
    taken = FusedRequests(model, tables, 32.0).take(fused_request(model, given))
    assert [int(user["uih_ids"][1, 0]) for user in taken.users] == [1, expected]
    bad = taken.row_status[:, RowStatus.BAD_ID].tolist()
    assert bad == [0, 1] and len(set(taken.row_status.sum(axis=1))) == 1
    assert sum(tables.tally.take()[1].values()) == 1


@pytest.mark.parametrize("given", [9, -1, 2**62, -(2**63)])
def test_bad_ids_are_refused(make_model, given):
    model = make_model()
    with pytest.raises(InputError, match=str(given)):
        FusedRequests(model, OwnTables(model, "reject"), 32.0).take(fused_request(model, given))


def test_good_ids_and_their_status_pass_as_they_came(make_model):
    """The quick look says of every user what the slow one says."""
    model, tables = make_model(), OwnTables(make_model(), "reject")
    request = fused_request(model, 8)
    taken = FusedRequests(model, tables, 32.0).take(request)
    width = sum(array.shape[1] for name, array in request.items() if name.endswith("_ids"))
    assert taken.row_status[:, RowStatus.GPU].tolist() == [width, width] == taken.row_status.sum(axis=1).tolist()


@pytest.fixture(scope="module")
def deployment(exported, tmp_path_factory):
    options = Options(flavour="cuda", cuda=CPU)
    return assemble(read_model_folder(exported("fp32")), tmp_path_factory.mktemp("cuda") / "ckptA", options)


@pytest.fixture(scope="module")
def server(deployment):
    """(server, port of its metrics)"""
    port = choose_port(LOOPBACK, 0)
    running = Serve(deployment, "--metrics-port", str(port))
    yield running, port
    running.stop(signal.SIGKILL)


@pytest.mark.triton
@pytest.mark.parametrize(("model", "stage"), [("ranking", "ranking"), (FUSED, FUSED)])
@pytest.mark.parametrize(("events", "items"), [(0, 1), (1, 3), (40, 7), (128, 300)])
def test_served_scores_are_the_models(deployment, server, model, stage, events, items):
    request = request_of(deployment, events, items, seed=events)
    with RankingClient(server[0].url, model) as client:
        answer = client.ask(request)
    expected = in_process(deployment, model, request)
    np.testing.assert_allclose(answer.scores, expected, rtol=0, atol=TOLERANCES[stage, "fp32"].atol)
    assert answer.rows == {"gpu": sum(answer.rows.values())} and sum(answer.rows.values()) > 0


@pytest.mark.triton
def test_company_changes_no_score_and_bad_requests_spoil_their_own(deployment, server):
    """64 requests at once, every fifth of them wrong, each in its own way."""
    config = deployment.model.ranking_config
    packed = [one_user(pack(config, [request_of(deployment, n % 37, 1 + n % 5, seed=n)])) for n in range(64)]
    with RankingClient(server[0].url, FUSED) as client:
        alone = [client.infer(tensors) for tensors in packed]
        wrong = {n: dict(packed[n]) for n in range(0, 64, 5)}
        for n, tensors in wrong.items():
            name = ("candidate_ids", "uih_timestamps")[n % 2]
            tensors[name] = tensors[name] + 10**9 if name.endswith("ids") else tensors[name][:, :-1]

        def ask(n):
            try:
                return client.infer(wrong.get(n, packed[n]))
            except InputError as error:
                return str(error)

        with ThreadPoolExecutor(32) as pool:
            together = list(pool.map(ask, range(64)))
    for n, (found, expected) in enumerate(zip(together, alone, strict=True)):
        if n in wrong:
            assert isinstance(found, str) and "tensor" in found, (n, found)
        else:
            np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0, err_msg=f"request {n}")


@pytest.mark.triton
def test_users_of_a_request_stay_in_their_order(deployment, server):
    config = deployment.model.ranking_config
    users = [one_user(pack(config, [request_of(deployment, 9, 4, seed=n)])) for n in range(5)]
    with RankingClient(server[0].url, FUSED) as client:
        together = client.infer({name: np.concatenate([user[name] for user in users]) for name in users[0]})
        for n, user in enumerate(users):
            np.testing.assert_allclose(together[n], client.infer(user)[0], atol=1e-6, rtol=0)


@pytest.mark.triton
def test_a_step_refuses_offsets_that_would_lead_a_kernel_astray(deployment, server):
    import tritonclient.grpc as grpc_client

    spec, client = deployment.model.specs["hstu"], grpc_client.InferenceServerClient(server[0].url)
    feed = {}
    for tensor in spec.inputs:
        dims = [2 if not isinstance(dim, int) else dim for dim in tensor.dims]
        feed[tensor.name] = np.ones(dims, tensor.dtype)
    feed |= {"uih_offsets": np.asarray([0, 2000], np.int32), "candidate_offsets": np.asarray([0, 2], np.int32)}
    feed |= {name: np.ones((1, *feed[name].shape[1:]), feed[name].dtype) for name in ("contextual_embeddings",)}
    feed["attention_norm"] = np.asarray([128], np.float32)
    inputs = []
    for name, array in feed.items():
        kind = {"float32": "FP32", "int64": "INT64", "int32": "INT32"}[str(array.dtype)]
        inputs.append(grpc_client.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    with pytest.raises(Exception, match="'uih_offsets' ends with 2000"):
        client.infer("hstu", inputs, client_timeout=30)
    client.close()


@pytest.mark.triton
def test_metrics_tell_of_micro_batches(deployment, server):
    config = deployment.model.ranking_config
    tensors = one_user(pack(config, [request_of(deployment, 30, 5)]))
    with RankingClient(server[0].url, FUSED) as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: client.infer(tensors), range(64)))

    def users():
        found = series(server[1], "batches_total", FUSED)
        return sum(int(labels.split('users="')[1].split('"')[0]) * value for labels, value in found.items())

    eventually(lambda: users() >= 64, "counted once a second")
    for name in ("batch_seconds_total", "batch_tokens_total", "waited_seconds_total"):
        assert sum(series(server[1], name, FUSED).values()) > 0
    eventually(lambda: list(series(server[1], "waiting_requests", FUSED).values()) == [0])


def series(port, name, model):
    """Values of a metric of the model, by labels."""
    start, label = f"hstu_trt_{name}{{", f'model="{model}"'
    return {key: value for key, value in scraping.series(port).items() if key.startswith(start) and label in key}


@pytest.fixture(scope="module")
def narrow(exported, tmp_path_factory):
    """(deployment in which two requests may wait, server, port of its metrics)"""
    options = Options(flavour="cuda", cuda=CPU, queue=2)
    deployment = assemble(read_model_folder(exported("fp32")), tmp_path_factory.mktemp("cuda") / "narrow", options)
    port = choose_port(LOOPBACK, 0)
    # Without the supervisor, whose canaries may be refused too.
    running = Serve(deployment, "--metrics-port", str(port), "--no-restart")
    yield deployment, running, port
    running.stop(signal.SIGKILL)


@pytest.mark.triton
@pytest.mark.parametrize(("model", "door"), [(FUSED, FUSED), (ENSEMBLE, "embedding_lookup")])
def test_more_than_may_wait_is_refused_at_once_and_counted(narrow, model, door):
    deployment, running, port = narrow
    tensors = pack(deployment.model.ranking_config, [request_of(deployment, 120, 300)])
    tensors = one_user(tensors) if model == FUSED else tensors
    with RankingClient(running.url, model) as client:
        expected = client.infer(tensors)
        futures = [client._send(tensors, None) for _ in range(64)]
        refused = [future.exception(60) for future in futures if future.exception(60) is not None]
        assert 0 < len(refused) < 64
        for error in refused:
            assert isinstance(error, OverloadedError) and "2 requests wait already" in str(error)
        for future in futures:
            if future.exception() is None:
                np.testing.assert_allclose(future.result().as_numpy("preds"), expected, atol=1e-6, rtol=0)
        eventually(lambda: sum(series(port, "shed_total", door).values()) == len(refused))
        eventually(lambda: sum(series(port, "waiting_requests", door).values()) == 0, "as of the last poll")
        np.testing.assert_allclose(client.infer(tensors), expected, atol=1e-6, rtol=0)


@pytest.mark.triton
def test_a_stop_answers_what_was_accepted(deployment):
    """Its own server, stopped while requests are under way: each is answered, or told that the server is going."""
    running = Serve(deployment)
    config = deployment.model.ranking_config
    tensors = one_user(pack(config, [request_of(deployment, 120, 300)]))
    with RankingClient(running.url, FUSED) as client:
        expected = client.infer(tensors)
        futures = [client._send(tensors, None) for _ in range(24)]
        futures[0].result(60)
        assert running.stop() == 0
        scores = [future.result(60).as_numpy("preds") for future in futures]
    for found in scores:
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
