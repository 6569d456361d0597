"""Bad input to a running deployment: it stays whole, and every answer is right or a clear refusal."""

import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest
from served import Serve
from tritonclient.grpc import service_pb2 as protocol

from hstu_trt.bench.fuzz import Plan, fuzz
from hstu_trt.bench.fuzz_oracle import Oracle
from hstu_trt.bench.fuzz_report import report_text
from hstu_trt.bench.fuzz_requests import INFER, make_bases
from hstu_trt.bench.fuzz_tensors import set_shape
from hstu_trt.bench.fuzz_watch import held_by

pytestmark = [pytest.mark.triton, pytest.mark.faults]
ROOT = Path(__file__).resolve().parents[2]
SEED = 7


@pytest.fixture(scope="session", autouse=True)
def guard_library():
    subprocess.run(["make", "-s", "-C", str(ROOT), "guard-lib"], check=True, capture_output=True)


def test_100_000_requests(deployment, tmp_path):
    report = fuzz(deployment, Plan(seed=SEED, requests=100_000, out=tmp_path))
    print(report_text(report))
    assert report.is_clean, report_text(report)
    assert report.result.counts.total() == 100_000
    assert {large.status for large in report.large} <= {"OK", "INVALID_ARGUMENT"} and len(report.large) == 3
    assert len(report.wire) > 15, "each attack on the wire has had its turn"


@pytest.fixture(scope="module")
def served(deployment):
    serve = Serve(deployment)
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


@pytest.mark.parametrize(("spoil", "words"), SHIELDED.values(), ids=SHIELDED)
@pytest.mark.parametrize("model", ["ranking_fused", "embedding_lookup"])
def test_what_ends_or_bloats_an_unguarded_server_is_refused(served, bases, model, spoil, words):
    if model == "embedding_lookup" and spoil is classes_of_scores:
        pytest.skip("no scores")
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
    assert after.shared_mib <= before.shared_mib + 1, "shared memory never shrinks again"


def listening(pids):
    """Addresses and ports that any of the processes listens on; of IPv6 the part that holds an address of IPv4."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            inodes.update(re.findall(r"socket:\[(\d+)\]", os.readlink(handle)))
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {
        (socket.inet_ntoa(struct.pack("<I", int(row[1].partition(":")[0][-8:], 16))), int(row[1].partition(":")[2], 16))
        for row in rows
        if row[3] == "0A" and row[9] in inodes
    }


def test_nothing_but_grpc_listens(served):
    """The requests that end older servers over HTTP have nowhere to go; there is no option that opens it."""
    host, _, port = served.url.rpartition(":")
    assert listening(held_by(served.facts["pid"]).processes) == {(host, int(port))}
    command = Path(f"/proc/{served.facts['pid']}/cmdline").read_bytes().split(b"\0")
    assert b"--allow-http=false" in command
    helped = subprocess.run(
        [sys.executable, "-m", "hstu_trt.serving.serve", "--help"], check=True, capture_output=True, text=True
    )
    assert "http" not in helped.stdout.lower()


def test_a_finding_can_be_replayed(served, deployment, tmp_path):
    """A server of another deployment gives answers that are wrong for this one: each is a finding, with a file."""
    from hstu_trt.bench.fuzz import main

    out = ["--out", str(tmp_path / "found"), "--large-mib", "0"]
    other = ["--deployment", str(tmp_path / "other")]
    from hstu_trt.serving.assemble import Options, assemble

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
    from hstu_trt.bench.fuzz_requests import read

    return read(request, oracle.signatures)
