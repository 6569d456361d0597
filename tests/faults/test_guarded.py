"""What ends or bloats the bare tritonserver 2.51 is refused (docs/bad_input.md), and nothing but gRPC listens."""

import re
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from listening import listening
from scraping import counted
from served import Serve
from tritonclient.grpc import service_pb2 as protocol
from waiting import PATIENCE_S, holds_eventually, settled

from hstu_trt.bench.fuzz.cases import Case
from hstu_trt.bench.fuzz.large import send_large
from hstu_trt.bench.fuzz.requests import INFER
from hstu_trt.bench.fuzz.tensors import set_shape
from hstu_trt.bench.fuzz.verdict import Outcome, verdict
from hstu_trt.bench.fuzz.watch import held_by
from hstu_trt.serving.server import choose_port

pytestmark = [pytest.mark.triton, pytest.mark.faults]
ROUNDS, LARGE_MIB = 7, 64
CANARIES_MIB = 4
"""A canary of ``serve`` that comes between may cost each model 1 MiB of shared memory; a large tensor takes 16."""


@pytest.fixture(scope="module")
def served(patient):
    serve = Serve(patient)
    yield serve
    assert serve.stop() == 0


def place_of(request, name):
    return next(place for place, tensor in enumerate(request.inputs) if tensor.name == name)


def wrapping(request, rows=2**60):
    """A shape whose bytes are 0 modulo 2^64, over no data: ends a Python model of tritonserver 2.51."""
    place = place_of(request, "uih_ids")
    set_shape(request.inputs[place], [rows, 2] if request.model_name != "ranking_fused" else [1, 2 * rows])
    request.raw_input_contents[place] = b""


def classes(request):
    """Classes of a string: tritonserver 2.51 divides by zero."""
    request.outputs.add(name="tables_version").parameters["classification"].int64_param = 1
    request.outputs.add(name="row_status")


def classes_of_scores(request):
    request.outputs.add(name="preds").parameters["classification"].int64_param = 1


def large(request):
    place = place_of(request, "uih_ids")
    count = 1 << 20
    set_shape(request.inputs[place], [count, 2] if request.model_name != "ranking_fused" else [1, 2 * count])
    request.raw_input_contents[place] = bytes(16 * count)


def long_id(request):
    request.id = "x" * 2000


def many_parameters(request):
    for number in range(65):
        request.parameters[f"p{number}"].int64_param = number


SHIELDED = {
    "a shape that wraps": (wrapping, r"tensor 'uih_ids' has shape \[1*,? ?\d+, ?\d*\], which its 0 bytes do not fill"),
    "classes of a string": (classes, "'classification' of an output is not served"),
    "classes of scores": (classes_of_scores, "'classification' of an output is not served"),
    "a tensor of 16 MiB": (large, r"16777216 of them in tensor 'uih_ids'; at most \d+ are served"),
    "a long id": (long_id, "id has 2000 bytes; at most 1024 are served"),
    "many parameters": (many_parameters, "has 65 parameters"),
}


@pytest.mark.parametrize(
    ("model", "what"),
    [(model, what) for model in ("ranking_fused", "embedding_lookup") for what in SHIELDED
     if (model, what) != ("embedding_lookup", "classes of scores")],
)  # fmt: skip
def test_what_ends_or_bloats_an_unguarded_server_is_refused(served, bases, model, what):
    spoil, words = SHIELDED[what]
    before = held_by(served.facts["pid"])
    request = protocol.ModelInferRequest()
    request.CopyFrom(bases[model][5])
    spoil(request)
    with grpc.insecure_channel(served.url) as channel:
        call = channel.unary_unary(INFER)
        with pytest.raises(grpc.RpcError) as error:
            call(request.SerializeToString(), timeout=PATIENCE_S)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert re.search(words, error.value.details())
        call(bases[model][5].SerializeToString(), timeout=PATIENCE_S)
    after = held_by(served.facts["pid"])
    assert after.processes == before.processes
    assert after.shared_mib <= before.shared_mib + CANARIES_MIB, "shared memory never shrinks again"


SOME_OUTPUTS = [["preds"], ["tables_version"], ["row_status", "preds"], ["row_status", "preds", "tables_version"]]


# Triton's ensemble cannot answer without the last step's output.
@pytest.mark.parametrize(
    ("model", "wanted"),
    [(model, wanted) for model in ("ranking", "ranking_fused") for wanted in SOME_OUTPUTS
     if model == "ranking_fused" or "preds" in wanted],
)  # fmt: skip
def test_some_outputs(served, bases, model, wanted):
    """An output too many in an answer that comes later ends a model process of tritonserver 2.51."""
    before = held_by(served.facts["pid"])
    request = protocol.ModelInferRequest()
    request.CopyFrom(bases[model][5])
    for name in wanted:
        request.outputs.add(name=name)
    with grpc.insecure_channel(served.url) as channel:
        body = channel.unary_unary(INFER)(request.SerializeToString(), timeout=PATIENCE_S)
    answer = protocol.ModelInferResponse.FromString(body)
    assert sorted(output.name for output in answer.outputs) == sorted(wanted)
    assert held_by(served.facts["pid"]).processes == before.processes


@pytest.mark.parametrize("model", ["ranking_fused", "embedding_lookup"])
def test_bad_requests_in_a_batch_harm_nobody(served, bases, oracle, model):
    """Good answers come later than the refusals of their batch; each is right, and counted as what it is."""
    before, refused = held_by(served.facts["pid"]), settled(lambda: counted(served.url)[model][1], 0.3)
    answered, _ = counted(served.url)[model]
    good, bad, rounds = bases[model][5], protocol.ModelInferRequest(), 40
    bad.CopyFrom(good)
    wrapping(bad)
    with grpc.insecure_channel(served.url) as channel:
        call = channel.unary_unary(INFER)
        bodies = [each.SerializeToString() for _ in range(rounds) for each in (good, bad)]
        calls = [call.future(body, timeout=PATIENCE_S) for body in bodies]
        answers = [each.result() for each in calls[::2]]
        codes = {each.code() for each in calls[1::2]}
    assert codes == {grpc.StatusCode.INVALID_ARGUMENT}
    case = Case(number=0, kind="good", body=good.SerializeToString())
    assert not [what for body in answers if (what := verdict(case, Outcome("OK", "", body, 0.1), oracle))]

    def all_counted():
        now_answered, now_refused = counted(served.url)[model]
        assert rounds <= now_answered - answered, "canaries of serve come between"
        assert now_refused - refused == rounds

    holds_eventually(all_counted)
    assert held_by(served.facts["pid"]).processes == before.processes


def test_nothing_but_grpc_listens(served):
    """The requests that end older servers over HTTP have nowhere to go; there is no option that opens it."""
    host, _, port = served.url.rpartition(":")
    assert listening(held_by(served.process.pid).processes) == {(host, int(port))}, "of serve and all below it"
    command = Path(f"/proc/{served.facts['pid']}/cmdline").read_bytes().split(b"\0")
    assert b"--allow-http=false" in command
    helped = subprocess.run(
        [sys.executable, "-m", "hstu_trt.serving.serve", "--help"], check=True, capture_output=True, text=True
    )
    assert not re.search(r"--\S*http", helped.stdout.lower()), "only the address of a collector of traces has it"


@pytest.fixture(scope="module")
def metered(patient):
    """(a server of its own, the port of its metrics)."""
    port = choose_port("127.0.0.1", 0)
    serve = Serve(patient, "--metrics-port", str(port))
    yield serve, port
    assert serve.stop() == 0


def test_metrics_listen_where_they_are_told_to(metered):
    serve, metrics = metered
    host, _, port = serve.url.rpartition(":")
    assert listening(held_by(serve.process.pid).processes) == {(host, int(port)), (host, metrics)}


def test_large_messages_are_not_kept_one_by_one(metered, bases):
    """The allocator keeps the pages of a few: seven more rounds of three messages do not add those of three more."""
    serve, _ = metered
    held = []
    for _ in range(2 * ROUNDS):
        found = send_large(serve.url, bases["ranking"][0], LARGE_MIB << 20)
        assert not [large.fault for large in found if large.fault]
        held.append(held_by(serve.facts["pid"]).server_mib)
    print(f"MiB held after each round of large messages: {[round(each) for each in held]}")
    assert max(held[ROUNDS:]) - max(held[:ROUNDS]) <= 2 * LARGE_MIB, held
