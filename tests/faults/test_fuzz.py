"""Bad input to a running deployment: it stays whole, and every answer is right or a clear refusal."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest
from listening import listening
from served import Serve
from tritonclient.grpc import InferenceServerClient
from tritonclient.grpc import service_pb2 as protocol
from waiting import eventually, holds_eventually, settled

from hstu_trt.bench.fuzz.calls import STREAM
from hstu_trt.bench.fuzz.cases import Case
from hstu_trt.bench.fuzz.large import send_large
from hstu_trt.bench.fuzz.oracle import Oracle
from hstu_trt.bench.fuzz.report import report_text
from hstu_trt.bench.fuzz.requests import INFER, make_bases
from hstu_trt.bench.fuzz.tensors import set_shape
from hstu_trt.bench.fuzz.verb import Plan, fuzz
from hstu_trt.bench.fuzz.verdict import Outcome, verdict
from hstu_trt.bench.fuzz.watch import held_by
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.server import choose_port

pytestmark = [pytest.mark.triton, pytest.mark.faults]
ROOT = Path(__file__).resolve().parents[2]
SEED = 7
ROUNDS, LARGE_MIB = 7, 64
CANARIES_MIB = 4
"""A canary of ``serve`` that comes between may cost each model 1 MiB of shared memory; a large tensor takes 16."""


@pytest.fixture(scope="session", autouse=True)
def guard_library():
    subprocess.run(["make", "-s", "-C", str(ROOT), "guard-lib"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def patient(deployment, tmp_path_factory):
    """The deployment with room for all that the fuzzer has in flight, so that no answer is spared by shedding."""
    return assemble(deployment.model, tmp_path_factory.mktemp("patient") / "ckptA", Options(queue=1000))


def test_100_000_requests(patient, tmp_path):
    report = fuzz(patient, Plan(seed=SEED, requests=100_000, out=tmp_path))
    print(report_text(report))
    assert report.is_clean, report_text(report)
    assert report.result.counts.total() == 100_000
    assert report.result.shed == 0, "every answer is judged"
    assert {large.status for large in report.large} <= {"OK", "INVALID_ARGUMENT"} and len(report.large) == 3
    assert len(report.wire) > 15, "each attack on the wire has had its turn"


def test_what_is_shed_is_counted_and_no_finding(deployment, tmp_path):
    """With the queue as it is by default; what is answered is judged as ever."""
    report = fuzz(deployment, Plan(seed=SEED, requests=4000, large_mib=0, out=tmp_path))
    assert report.is_clean, report_text(report)
    assert 0 < report.result.shed < 4000
    assert f"{report.result.shed} shed, and not judged" in report_text(report)


@pytest.fixture(scope="module")
def served(patient):
    serve = Serve(patient)
    yield serve
    assert serve.stop() == 0


@pytest.fixture(scope="module")
def oracle(deployment):
    return Oracle(deployment)


@pytest.fixture(scope="module")
def bases(oracle):
    return make_bases(oracle, oracle.signatures, SEED)


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
            call(request.SerializeToString(), timeout=20)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert re.search(words, error.value.details())
        call(bases[model][5].SerializeToString(), timeout=20)
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
        body = channel.unary_unary(INFER)(request.SerializeToString(), timeout=20)
    answer = protocol.ModelInferResponse.FromString(body)
    assert sorted(output.name for output in answer.outputs) == sorted(wanted)
    assert held_by(served.facts["pid"]).processes == before.processes


def statistics(url, model):
    with InferenceServerClient(url) as client:
        return client.get_inference_statistics(model).model_stats[0]


def counted(url, model):
    """(requests that a model answered, requests that it refused): Triton counts a moment after it has answered."""
    found = statistics(url, model).inference_stats
    return found.success.count, found.fail.count


@pytest.mark.parametrize("model", ["ranking_fused", "embedding_lookup"])
def test_bad_requests_in_a_batch_harm_nobody(served, bases, oracle, model):
    """Good answers come later than the refusals of their batch; each is right, and counted as what it is."""
    before, refused = held_by(served.facts["pid"]), settled(lambda: counted(served.url, model)[1], 0.3)
    answered, _ = counted(served.url, model)
    good, bad, rounds = bases[model][5], protocol.ModelInferRequest(), 40
    bad.CopyFrom(good)
    wrapping(bad)
    with grpc.insecure_channel(served.url) as channel:
        call = channel.unary_unary(INFER)
        calls = [call.future(each.SerializeToString(), timeout=20) for _ in range(rounds) for each in (good, bad)]
        answers = [each.result() for each in calls[::2]]
        codes = {each.code() for each in calls[1::2]}
    assert codes == {grpc.StatusCode.INVALID_ARGUMENT}
    case = Case(number=0, kind="good", body=good.SerializeToString())
    assert not [what for body in answers if (what := verdict(case, Outcome("OK", "", body, 0.1), oracle))]

    def all_counted():
        now_answered, now_refused = counted(served.url, model)
        # Canaries of ``serve`` come between.
        assert rounds <= now_answered - answered <= 2 * rounds
        assert now_refused - refused == rounds

    holds_eventually(all_counted, timeout_s=10)
    assert held_by(served.facts["pid"]).processes == before.processes


def test_a_server_that_died_is_a_finding(patient, tmp_path):
    """``serve`` starts another one within seconds; the calls that were on the way tell."""
    serve = Serve(patient)
    killer = threading.Thread(target=kill_under_load, args=(serve.url, serve.facts["pid"]))
    killer.start()
    report = fuzz(patient, Plan(seed=SEED, requests=20_000, large_mib=0, out=tmp_path), serve.url)
    killer.join()
    assert serve.stop() == 0
    assert not report.is_clean


def kill_under_load(url, pid):
    """Ends a server once it has answered hundreds of requests."""
    eventually(lambda: counted(url, "ranking_fused")[0] >= 300)
    os.kill(pid, signal.SIGKILL)


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


def test_an_answer_in_a_stream_is_judged(served, bases, oracle):
    request = bases["ranking"][5]
    case = Case(number=0, kind="stream", method=STREAM, body=request.SerializeToString())
    with grpc.insecure_channel(served.url) as channel:
        body = channel.unary_unary(STREAM)(case.body, timeout=20)
    assert verdict(case, Outcome("OK", "", body, 0.1), oracle) is None
    answer = protocol.ModelStreamInferResponse.FromString(body)
    place = [output.name for output in answer.infer_response.outputs].index("preds")
    raw = np.frombuffer(answer.infer_response.raw_output_contents[place], np.float32) + np.float32(0.1)
    answer.infer_response.raw_output_contents[place] = raw.tobytes()
    assert "is right" in verdict(case, Outcome("OK", "", answer.SerializeToString(), 0.1), oracle)
    assert "answered with 0" in verdict(case, Outcome("OK", "", b"", 0.1), oracle)


def test_a_finding_can_be_replayed(served, deployment, tmp_path):
    """A server of another deployment gives answers that are wrong for this one: each is a finding, with a file."""
    from hstu_trt.bench.fuzz.verb import main

    out = ["--out", str(tmp_path / "found"), "--large-mib", "0"]
    other = ["--deployment", str(tmp_path / "other")]
    assemble(deployment.model, tmp_path / "other", Options(attention_norm="fixed:7"))
    assert main([*other, "--url", served.url, "--seed", "1", "--requests", "200", *out]) == 1
    found = sorted((tmp_path / "found").glob("1_*.json"))
    assert found
    assert main([*other, "--url", served.url, "--replay", str(found[0])]) == 1
    assert main(["--deployment", str(deployment.path), "--url", served.url, "--replay", str(found[0])]) == 0


def test_scores_of_the_oracle_are_the_served_ones(served, oracle, bases):
    """What the fuzzer holds answers against is not lenient: it has scores, and they differ between requests."""
    answers = [oracle.answer("ranking", _tensors(oracle, request))["preds"] for request in bases["ranking"]]
    assert all(np.isfinite(preds).all() for preds in answers)
    assert len({preds.tobytes() for preds in answers}) == len(answers)


def _tensors(oracle, request):
    from hstu_trt.bench.fuzz.requests import read

    return read(request, oracle.signatures)
