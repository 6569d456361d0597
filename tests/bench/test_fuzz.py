"""The fuzzer without a server: cases by their number, and what it calls a finding."""

import os
import random
import subprocess
import sys

import grpc
import pytest
from tritonclient.grpc import service_pb2 as protocol

from hstu_trt.bench.fuzz.calls import CLOSED
from hstu_trt.bench.fuzz.cases import KINDS, Case, make_case
from hstu_trt.bench.fuzz.files import read_case, write_finding
from hstu_trt.bench.fuzz.oracle import Oracle
from hstu_trt.bench.fuzz.requests import make_bases, parse, read
from hstu_trt.bench.fuzz.tensors import set_shape
from hstu_trt.bench.fuzz.verdict import SHED, Finding, Outcome, verdict
from hstu_trt.bench.fuzz.watch import Held, growth, held_by
from hstu_trt.bench.fuzz.wire import ATTACKS
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.assemble import Options, assemble

STATUSES = {status.name for status in grpc.StatusCode}


@pytest.fixture(scope="module")
def oracle(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "deployment"
    return Oracle(assemble(read_model_folder(exported("fp32")), folder, Options()))


@pytest.fixture(scope="module")
def bases(oracle):
    return make_bases(oracle, oracle.signatures, 1)


def test_a_case_is_its_seed_and_number(oracle, bases):
    cases = [make_case(3, number, bases, oracle.signatures) for number in range(300)]
    again = [make_case(3, number, bases, oracle.signatures) for number in reversed(range(300))]
    assert cases == again[::-1]
    assert cases != [make_case(4, number, bases, oracle.signatures) for number in range(300)]
    assert len({case.kind for case in cases}) > len(KINDS) * 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_spoils_requests_to_every_model(oracle, bases, kind):
    spoiled = 0
    for model, requests in bases.items():
        for number in range(60):
            request = type(requests[0])()
            base = requests[number % len(requests)]
            request.CopyFrom(base)
            other = KINDS[kind][1](random.Random(number), request, oracle.signatures[model])
            spoiled += bool(other) or request != base
    assert (spoiled == 0) if kind == "untouched" else spoiled > 100


def test_bases_are_right_requests(oracle, bases):
    for model, requests in bases.items():
        for request in requests:
            assert oracle.answer(model, read(request, oracle.signatures))


def ok(oracle, request, change=lambda answer: None):
    """The answer to a request, spoiled or not."""
    expected = oracle.answer(request.model_name, read(request, oracle.signatures))["preds"]
    answer = protocol.ModelInferResponse(model_name=request.model_name, id=request.id)
    for name in ("preds", "tables_version", "row_status"):
        answer.outputs.add(name=name, datatype="FP32" if name == "preds" else "INT64", shape=expected.shape)
        answer.raw_output_contents.append(expected.tobytes() if name == "preds" else b"")
    change(answer)
    return Outcome("OK", "", answer.SerializeToString(), 0.1)


def judged(oracle, request, outcome, **other):
    return verdict(Case(number=0, kind="test", body=request.SerializeToString(), **other), outcome, oracle)


def wrong_score(answer):
    raw = bytearray(answer.raw_output_contents[0])
    raw[3] ^= 1
    answer.raw_output_contents[0] = bytes(raw)


def lost_output(answer):
    del answer.outputs[2], answer.raw_output_contents[2]


def wrong_shape(answer):
    answer.outputs[0].shape[0] += 1


def test_the_right_answer_is_fine(oracle, bases):
    assert judged(oracle, bases["ranking"][3], ok(oracle, bases["ranking"][3])) is None


WRONG = {"score": wrong_score, "output": lost_output, "shape": wrong_shape, "id": lambda a: setattr(a, "id", "other")}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_a_finding(oracle, bases, change):
    assert judged(oracle, bases["ranking"][3], ok(oracle, bases["ranking"][3], change))


@pytest.mark.parametrize("code", sorted(STATUSES - {"OK"}))
def test_a_right_request_may_not_be_refused(oracle, bases, code):
    assert judged(oracle, bases["ranking"][3], Outcome(code, "some words", b"", 0.1))


def bad_id(bases):
    request = type(bases["ranking"][3])()
    request.CopyFrom(bases["ranking"][3])
    place = next(place for place, tensor in enumerate(request.inputs) if tensor.name == "candidate_ids")
    raw = request.raw_input_contents[place]
    request.raw_input_contents[place] = raw[:-8] + (-1).to_bytes(8, "little", signed=True)
    return request


def test_a_wrong_request_is_refused_in_the_words_of_the_model(oracle, bases):
    request = bad_id(bases)
    with pytest.raises(InputError) as error:
        oracle.answer("ranking", read(request, oracle.signatures))
    words = str(error.value)
    assert "'candidate_ids'" in words and " -1 " in words
    for said, is_fine in ((f"in ensemble 'ranking', {words}", True), ("something is wrong", False), ("", False)):
        assert (judged(oracle, request, Outcome("INVALID_ARGUMENT", said, b"", 0.1)) is None) == is_fine
    for code in ("INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNKNOWN", "CANCELLED"):
        assert judged(oracle, request, Outcome(code, words, b"", 0.1))
    assert judged(oracle, request, ok(oracle, bases["ranking"][3])), "answered"


SHED_WORDS = {
    "ranking": "in ensemble 'ranking', overloaded: 8 requests wait already",
    "ranking_fused": "overloaded: 8 requests wait already",
}


@pytest.mark.parametrize(("model", "words"), SHED_WORDS.items())
def test_a_request_may_be_shed(oracle, bases, model, words):
    outcome = Outcome("UNAVAILABLE", words, b"", 0.1)
    assert outcome.status == SHED
    assert judged(oracle, bases[model][3], outcome) is None
    assert judged(oracle, bad_id(bases), outcome) is None, "shed before anybody looked at it"
    assert judged(oracle, bases["hstu"][3], outcome), "has no queue"
    for code, said in (("UNAVAILABLE", "Socket closed"), ("UNAVAILABLE", f"x {words}"), ("INTERNAL", words)):
        other = Outcome(code, said, b"", 0.1)
        assert other.status == code
        assert judged(oracle, bases[model][3], other)


def test_bytes_that_are_no_message(oracle):
    case = Case(number=0, kind="test", body=b"\xff" * 9)
    assert parse(case.body) is None
    assert verdict(case, Outcome("INTERNAL", "Unable to parse request", b"", 0.1), oracle) is None
    assert verdict(case, Outcome("INTERNAL", "Stub process is not healthy", b"", 0.1), oracle)
    assert verdict(case, Outcome("OK", "", b"", 0.1), oracle)


def test_closed_calls(oracle):
    case = Case(number=0, kind="test", method=f"/inference.GRPCInferenceService/{CLOSED[0]}")
    assert verdict(case, Outcome("OK", "", b"", 0.1), oracle)
    refused = "This protocol is restricted, expecting header 'x'"
    assert verdict(case, Outcome("UNAVAILABLE", refused, b"", 0.1), oracle) is None
    assert verdict(case, Outcome("UNAVAILABLE", "Socket closed", b"", 0.1), oracle)


@pytest.mark.parametrize("rows", [2**60, 2**61, 2**60 + 3])
def test_a_shape_that_wraps_must_be_refused(oracle, bases, rows):
    request = bad_id(bases)
    place = next(place for place, tensor in enumerate(request.inputs) if tensor.name == "candidate_ids")
    set_shape(request.inputs[place], [rows, 2])
    request.raw_input_contents[place] = bytes(rows * 16 % 2**64)
    assert read(request, oracle.signatures) is None


HELD = {
    "processes": {1: "tritonserver", 2: "stub"}, "server_mib": 50.0, "models_mib": 300.0, "shared_mib": 4.0,
    "handles": 40,
}  # fmt: skip
GROWN = {
    "processes": {1: "tritonserver"},
    "server_mib": 400.0,
    "models_mib": 600.0,
    "shared_mib": 300.0,
    "handles": 200,
}


def test_growth():
    before = Held(**HELD)
    assert growth(before, Held(**HELD | {"server_mib": 120.0})) == []
    for field, value in GROWN.items():
        assert len(growth(before, Held(**HELD | {field: value}))) == 1, field
    after = Held(**HELD | {"server_mib": 350.0 + 256})
    assert growth(before, after) and not growth(before, after, 300), "the allocator may keep one large message"
    assert growth(before, Held(**HELD | {"server_mib": 50.0 + 600}), 300), "but not two"


def test_a_process_that_died_is_not_held():
    """Nor one whose parent has not asked about it yet, as tritonserver does not."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in held_by(os.getpid()).processes
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert child.pid not in held_by(os.getpid()).processes


def test_a_finding_comes_back_from_its_file(tmp_path):
    case = Case(number=4, kind="k", method="/m", body=b"\x00\xff", metadata=(("a", "b"),), gzip=True)
    path = write_finding(tmp_path, 9, Finding(case, Outcome("INTERNAL", "d", b"", 0.5), "what"))
    assert read_case(path) == (9, case)
    for text in ("", "[]", '{"seed": 1}', '{"number": "x"}'):
        path.write_text(text)
        with pytest.raises(InputError, match="holds no finding"):
            read_case(path)


def test_attacks_on_the_wire_are_bytes_of_their_seed():
    for name, attack in ATTACKS.items():
        data = attack(random.Random(1))
        assert data == attack(random.Random(1)) and isinstance(data, bytes), name
