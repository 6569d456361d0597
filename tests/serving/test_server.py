"""A real tritonserver on the golden checkpoint: scores, batches, bad requests, and what is closed."""

import re
import subprocess
import sys

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from listening import listening
from served import Serve, in_process, request_of
from tritonclient.utils import InferenceServerException
from waiting import PATIENCE_S, eventually, settled

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.serving.answers import ServerError
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.models.live_stages import text_tensor
from hstu_trt.serving.requests import one_user, pack
from hstu_trt.tables.lookup_stage import HostLookup

pytestmark = pytest.mark.triton
BOTH = pytest.mark.parametrize("model", ["ranking", "ranking_fused"])
EXACT = 1e-6


@pytest.fixture(scope="module")
def served(deployment):
    # Without the supervisor, whose canaries are counted by the server too.
    serve = Serve(deployment, "--no-restart")
    yield serve
    assert serve.stop() == 0


@pytest.fixture
def client(served, model):
    with RankingClient(served.url, model, timeout_s=20) as client:
        yield client


@pytest.fixture
def config(deployment):
    return deployment.model.ranking_config


# (events, candidates) of users: ordinary, one token, no history, both limits of the history, around min_sequence
LENGTHS = [(8, 5), (1, 1), (0, 3), (127, 2), (128, 40), (19, 1), (15, 5), (64, 64)]


@pytest.fixture
def requests(deployment):
    return [request_of(deployment, *lengths, seed) for seed, lengths in enumerate(LENGTHS)]


def rank(client, request):
    return client.rank(request.user, request.history, request.candidates)


@BOTH
def test_scores_are_the_runner_s(deployment, client, requests, model):
    for request in requests[:4]:
        scores = rank(client, request)
        assert np.abs(scores - in_process(deployment, model, request)).max() <= EXACT


def test_ensemble_and_fused_agree(served, requests):
    with RankingClient(served.url, "ranking") as ensemble, RankingClient(served.url, "ranking_fused") as fused:
        for request in requests:
            difference = np.abs(rank(ensemble, request) - rank(fused, request)).max()
            assert difference <= TOLERANCES["ranking", "fp32"].atol


@BOTH
def test_users_do_not_change_each_other_s_scores(client, requests, model):
    together = client.rank_many(requests * 3)
    for request, scores in zip(requests * 3, together, strict=True):
        assert scores.shape == (len(request.candidates["item_query_time"]), 1)
        assert np.abs(scores - rank(client, request)).max() <= EXACT


def test_concurrent_requests_of_mixed_lengths_are_batched(served, requests):
    """On a busy machine they may come so slowly that each is run alone: then once more."""
    seen, expected = [], 32 + len(requests)

    def counts():
        answer = statistics.get_inference_statistics("ranking_fused", client_timeout=PATIENCE_S).model_stats[0]
        return np.asarray([answer.inference_count, answer.execution_count])

    statistics = grpc_client.InferenceServerClient(served.url)
    with statistics, RankingClient(served.url, "ranking_fused") as client:
        packed = [one_user(pack(client.config, [request])) for request in requests]
        long = {name: np.repeat(array, 32, axis=0) for name, array in packed[4].items()}
        for _ in range(10):
            before = settled(counts, 0.2)
            futures = [client._send(tensors) for tensors in [long, *packed]]  # these wait while the long one runs
            for future in futures:
                client._receive(future)
            # The server counts a batch after it has answered.
            eventually(lambda least=before[0] + expected: counts()[0] >= least)
            seen.append(tuple(settled(counts, 0.2) - before))
            # More inferences: of a test before, told late.
            if seen[-1][0] == expected and seen[-1][1] < 1 + len(requests):
                return
    raise AssertionError(f"{expected} inferences, in fewer than {1 + len(requests)} executions, are not among {seen}")


def changed(tensors, name, change):
    array = tensors[name].copy()
    result = change(array)
    return tensors | {name: array if result is None else result}


def put(*place, value):
    """Writes a value at a place of an array."""

    def change(array):
        array[place] = value

    return change


# name -> (tensor, change, what the message holds)
BAD_EITHER = {
    "dtype": ("uih_timestamps", lambda a: a.astype(np.int32), ["uih_timestamps", "INT32", "INT64"]),
    "float ids": ("candidate_ids", lambda a: a.astype(np.float32), ["candidate_ids", "FP32", "INT64"]),
    "shape": ("contextual_ids", lambda a: np.repeat(a, 3, 1), ["contextual_ids", "[1,3]"]),
    "contextual": ("contextual_ids", put(0, 0, value=50), ["contextual_ids", "user_id", "50 at [0, 0]", "0 to 49"]),
}
BAD_RANKING = {
    "rank": ("uih_timestamps", lambda a: a[None], ["uih_timestamps"]),
    "negative id": ("uih_ids", put(3, 0, value=-1), ["uih_ids", "item_id", "-1 at [3, 0]"]),
    "id out of range": ("candidate_ids", put(2, 1, value=23), ["candidate_ids", "23 at [2, 1]", "0 to 22"]),
    "huge id": ("uih_ids", put(0, 0, value=2**62), ["uih_ids", str(2**62), "[0, 0]"]),
    "lengths do not add up": ("uih_offsets", put(1, value=7), ["uih_offsets", "7 at [1]", "uih_timestamps", "8"]),
    "offsets past the end": ("candidate_offsets", put(1, value=10**9), ["candidate_offsets", str(10**9), "5"]),
    "offsets begin late": ("uih_offsets", put(0, value=2), ["uih_offsets", "2 at [0]"]),
    "offsets of two users": ("uih_offsets", lambda _: np.asarray([0, 4, 8], np.int32), ["uih_offsets", "2 users"]),
    "offsets fall below 0": ("uih_offsets", put(1, value=-4), ["uih_offsets", "-4 at [1]"]),
    "one offset": ("uih_offsets", lambda a: a[:1], ["uih_offsets"]),
    "fewer timestamps": ("candidate_timestamps", lambda a: a[:4], ["candidate_timestamps", "4", "5"]),
    "fewer actions": ("uih_actions", lambda a: a[:-1], ["uih_actions", "7"]),
}
BAD_FUSED = {
    "negative id": ("uih_ids", put(0, 6, value=-1), ["uih_ids", "item_id", "-1 at [3, 0]"]),
    "id out of range": ("candidate_ids", put(0, 5, value=23), ["candidate_ids", "23 at [2, 1]", "0 to 22"]),
    "odd ids": ("uih_ids", lambda a: a[:, :-1], ["uih_ids", "[1, 15]", "[1, 16]"]),
    "fewer actions": ("uih_actions", lambda a: a[:, :-1], ["uih_actions", "[1, 7]", "[1, 8]"]),
}
BAD = [
    *(("ranking", name, case) for name, case in (BAD_EITHER | BAD_RANKING).items()),
    *(("ranking_fused", name, case) for name, case in (BAD_EITHER | BAD_FUSED).items()),
]


@pytest.mark.parametrize(("model", "case"), [(m, c) for m, _, c in BAD], ids=[f"{m}: {n}" for m, n, _ in BAD])
def test_bad_tensor_is_named_and_the_server_lives(deployment, client, model, case):
    tensor, change, names = case
    request = request_of(deployment, 8, 5)
    packed = pack(deployment.model.ranking_config, [request])
    tensors = packed if model == "ranking" else one_user(packed)
    before = client.infer(tensors)
    with pytest.raises(InputError) as caught:
        client.infer(changed(tensors, tensor, change))
    for name in names:
        assert name in str(caught.value)
    assert np.array_equal(client.infer(tensors), before)


@BOTH
@pytest.mark.parametrize(
    ("lengths", "names"),
    [((8, 0), ["candidates"]), ((129, 2), ["129", "128"]), ((4, 2049), ["2049", "2048"])],
    ids=["no candidates", "long history", "many candidates"],
)
def test_lengths_beyond_the_limits(deployment, client, lengths, names, model):
    with pytest.raises(InputError) as caught:
        rank(client, request_of(deployment, *lengths))
    for name in names:
        assert name in str(caught.value)
    assert np.isfinite(rank(client, request_of(deployment, 8, 5))).all()


@BOTH
@pytest.mark.parametrize("name", ["uih_ids", "uih_timestamps"])
def test_missing_and_unknown_tensors(deployment, client, model, name):
    packed = pack(deployment.model.ranking_config, [request_of(deployment, 8, 5)])
    tensors = packed if model == "ranking" else one_user(packed)
    with pytest.raises(InputError, match=rf"expected \d inputs but got \d|{name}"):
        client.infer({key: array for key, array in tensors.items() if key != name})
    with pytest.raises(InputError, match="surplus"):
        client.infer({("surplus" if key == name else key): array for key, array in tensors.items()})


STEPS = [
    ("hstu", "uih_embeddings", np.nan),
    ("hstu", "candidate_embeddings", np.inf),
    ("mlp_head", "user_embeddings", np.nan),
]


@pytest.mark.parametrize(("step", "tensor", "value"), STEPS)
@pytest.mark.parametrize("model", ["ranking"])
def test_nan_into_a_step_is_named(deployment, client, model, step, tensor, value):
    folder = deployment.model
    packed = pack(folder.ranking_config, [request_of(deployment, 8, 5)])
    rows = HostLookup(folder, "reject").infer({n: a for n, a in packed.items() if n.endswith("_ids")})
    vectors = {"user_embeddings": np.ones((5, folder.ranking_config.model_dim), np.float32)}
    known = packed | rows | vectors
    wanted = [spec.name for spec in folder.specs[step].inputs if spec.name != "attention_norm"]
    tensors = {name: known[name] for name in wanted} | {"dense_id": text_tensor(folder.digest)}
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor][2, 7] = value
    client.model = step
    with pytest.raises(InputError, match=rf"'{tensor}' holds {value} at \[2, 7\]"):
        client.infer(tensors)
    with pytest.raises(InputError, match=r"'dense_id' names no dense model: no model folder of digest 0000000"):
        client.infer(tensors | {"dense_id": text_tensor("0" * 64)})


def test_unknown_model_is_named(served):
    with RankingClient(served.url) as client:
        client.model = "rankng"
        with pytest.raises(ServerError, match=r"unknown model: 'rankng'.*NOT_FOUND"):
            client.infer({"uih_ids": np.zeros((1, 2), np.int64)})


def test_timeout_says_so(served, requests):
    with RankingClient(served.url) as client:
        client._timeout_s = 0.0001
        with pytest.raises(ServerError, match=r"no answer within 0.0001 s"):
            rank(client, requests[4])


def test_nobody_there():
    with pytest.raises(ServerError, match=r"is the server running\?"):
        RankingClient("127.0.0.1:1", timeout_s=5)


CLOSED = {
    "load": lambda c: c.load_model("hstu"),
    "unload": lambda c: c.unload_model("hstu"),
    "index": lambda c: c.get_model_repository_index(),
    "shared memory": lambda c: c.register_system_shared_memory("x", "/x", 8),
    "trace": lambda c: c.update_trace_settings(settings={"trace_level": "TIMESTAMPS"}),
    "log": lambda c: c.update_log_settings({"log_verbose_level": 1}),
}


@pytest.mark.parametrize("call", CLOSED.values(), ids=CLOSED)
def test_management_is_closed(served, call):
    client = grpc_client.InferenceServerClient(served.url)
    with pytest.raises(InferenceServerException, match=r"(?i)restricted|expected header|not found|unsupported"):
        call(client)
    client.close()


def test_server_listens_on_loopback_only(served):
    assert {address for address, _ in listening([served.facts["pid"]])} == {"127.0.0.1"}


def test_sample_client_prints_ranked_candidates(served):
    command = [sys.executable, "-m", "hstu_trt.serving.client", "--url", served.url]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 0, answer.stderr
    _, *ranked, served_by = answer.stdout.splitlines()
    assert re.fullmatch(r"tables caseA@[0-9a-f]{12}, rows: 27 host", served_by)
    scores = [float(line.split()[-1]) for line in ranked]
    assert len(scores) == 5
    assert scores == sorted(scores, reverse=True)
