"""Bad input to a running deployment: it stays whole, and every answer is right or a clear refusal; and the fuzzer that
says so: what it finds, and what it holds answers against."""

import os
import signal
import threading

import grpc
import numpy as np
import pytest
from scraping import counted
from served import Serve
from tritonclient.grpc import service_pb2 as protocol
from waiting import PATIENCE_S, eventually

from hstu_trt.bench.fuzz.calls import STREAM
from hstu_trt.bench.fuzz.cases import Case
from hstu_trt.bench.fuzz.report import report_text
from hstu_trt.bench.fuzz.requests import read
from hstu_trt.bench.fuzz.verb import Plan, fuzz, main
from hstu_trt.bench.fuzz.verdict import Outcome, verdict
from hstu_trt.serving.assemble import Options, assemble

pytestmark = [pytest.mark.triton, pytest.mark.faults]
SEED = 7


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
    eventually(lambda: counted(url)["ranking_fused"][0] >= 300)
    os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def served(patient):
    serve = Serve(patient)
    yield serve
    assert serve.stop() == 0


def test_an_answer_in_a_stream_is_judged(served, bases, oracle):
    request = bases["ranking"][5]
    case = Case(number=0, kind="stream", method=STREAM, body=request.SerializeToString())
    with grpc.insecure_channel(served.url) as channel:
        body = channel.unary_unary(STREAM)(case.body, timeout=PATIENCE_S)
    assert verdict(case, Outcome("OK", "", body, 0.1), oracle) is None
    answer = protocol.ModelStreamInferResponse.FromString(body)
    place = [output.name for output in answer.infer_response.outputs].index("preds")
    raw = np.frombuffer(answer.infer_response.raw_output_contents[place], np.float32) + np.float32(0.1)
    answer.infer_response.raw_output_contents[place] = raw.tobytes()
    assert "is right" in verdict(case, Outcome("OK", "", answer.SerializeToString(), 0.1), oracle)
    assert "answered with 0" in verdict(case, Outcome("OK", "", b"", 0.1), oracle)


def test_a_finding_can_be_replayed(served, deployment, tmp_path):
    """A server of another deployment gives answers that are wrong for this one: each is a finding, with a file."""
    out = ["--out", str(tmp_path / "found"), "--large-mib", "0"]
    other = ["--deployment", str(tmp_path / "other")]
    assemble(deployment.model, tmp_path / "other", Options(attention_norm="fixed:7"))
    assert main([*other, "--url", served.url, "--seed", "1", "--requests", "200", *out]) == 1
    found = sorted((tmp_path / "found").glob("1_*.json"))
    assert found
    assert main([*other, "--url", served.url, "--replay", str(found[0])]) == 1
    assert main(["--deployment", str(deployment.path), "--url", served.url, "--replay", str(found[0])]) == 0


def test_the_oracle_tells_requests_apart(oracle, bases):
    """What the fuzzer holds answers against is not lenient: it has scores, and they differ between requests."""
    answers = [oracle.answer("ranking", read(request, oracle.signatures))["preds"] for request in bases["ranking"]]
    assert all(np.isfinite(preds).all() for preds in answers)
    assert len({preds.tobytes() for preds in answers}) == len(answers)
