"""Parts of a load run: targets, Triton's counters, the machine, checks of the scores, rows, the baseline's ratios."""

import dataclasses
import json
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from load_rows_made import Dies, Echo, load_row
from waiting import eventually

from hstu_trt.bench.load import machine_watch
from hstu_trt.bench.load.client import ClosedLoop
from hstu_trt.bench.load.metrics import load_statistics
from hstu_trt.bench.load.processes import Clients
from hstu_trt.bench.load.rows import Measured, Subject, load_table, row_of, score_verdict, steps_table, workload_facts
from hstu_trt.bench.load.scenarios import Outcome
from hstu_trt.bench.load.serve_accuracy import Checks, judge
from hstu_trt.bench.load.stats import Repeated, summarise
from hstu_trt.bench.load.target import CallableTarget, TritonAddress, ask_all, infer_request, read_scores
from hstu_trt.bench.load.triton_statistics import ModelStatistics, added
from hstu_trt.bench.plan.queueing import fit_curve
from hstu_trt.bench.result_rows import Provenance, ResultRow
from hstu_trt.bench.serving import side_by_side
from hstu_trt.bench.workloads.requests_source import generate_requests
from hstu_trt.contract.errors import HstuTrtError


def test_processes_share_a_load():
    requests = [{"n": np.array([[number]])} for number in range(6)]
    with Clients(Echo(), requests, processes=2) as clients:
        records = clients.run(ClosedLoop(in_flight=2, requests=12))
    assert sorted(records.which.tolist()) == sorted([*range(6)] * 2) and not records.errors


def test_one_request_at_a_time_goes_through_all_of_them():
    requests = [{"n": np.array([[number]])} for number in range(6)]
    with Clients(Echo(), requests, processes=2) as clients:
        records = clients.run(ClosedLoop(in_flight=1, requests=12))
    assert records.which.tolist() == [*range(6)] * 2


def test_a_connection_that_cannot_be_closed_is_left(monkeypatch):
    """As gRPC's are after an interrupt in the midst of a sending."""
    monkeypatch.setattr("hstu_trt.bench.load.target._CLOSE_S", 0.01)
    target, never = TritonAddress(url="127.0.0.1:1", model="ranking").open(), threading.Event()
    channel, target._channel = target._channel, types.SimpleNamespace(close=never.wait)
    target.close()
    never.set()
    channel.close()


def test_an_interrupted_run_ends_its_clients():
    with pytest.raises(KeyboardInterrupt), Clients(Echo(), [{"n": np.zeros((1, 1))}], processes=2) as clients:
        ((child, pipe),) = clients._children
        pipe.send((ClosedLoop(in_flight=1, seconds=600.0), 1, 0.0))
        raise KeyboardInterrupt
    assert child.exitcode is not None


def test_a_client_process_that_dies_is_an_error():
    with pytest.raises(HstuTrtError, match="a client process of the load died"):
        Clients(Dies(), [{"n": np.zeros((1, 1))}], processes=2)


def test_scores_come_in_order():
    target = CallableTarget(lambda request: request["n"] * 2, workers=4)
    scores = ask_all(target, [{"n": np.array([[number]])} for number in range(9)])
    assert np.concatenate(scores).ravel().tolist() == [2 * number for number in range(9)]


@pytest.mark.parametrize(("served", "shape"), [("ranking", [3, 2]), ("ranking_fused", [1, 6])])
def test_requests_are_triton_s(served, shape):
    from tritonclient.grpc import service_pb2

    request = {"uih_ids": np.arange(6).reshape(3, 2), "uih_offsets": np.array([0, 3], np.int32)}
    message = service_pb2.ModelInferRequest.FromString(infer_request(served, request))
    named = {tensor.name: tensor for tensor in message.inputs}
    assert message.model_name == served and list(named["uih_ids"].shape) == shape
    assert ("uih_offsets" in named) == (served == "ranking") and named["uih_ids"].datatype == "INT64"
    assert message.raw_input_contents[0] == np.arange(6).tobytes()


@pytest.mark.parametrize("shape", [(3, 2), (1, 3, 2)])
def test_answers_are_read(shape):
    from tritonclient.grpc import service_pb2

    scores = np.arange(6, dtype=np.float32).reshape(shape)
    answer = service_pb2.ModelInferResponse()
    answer.outputs.add(name="other")
    answer.outputs.add(name="preds", shape=shape)
    answer.raw_output_contents.extend([b"", scores.tobytes()])
    assert (read_scores(answer.SerializeToString()) == scores.reshape(3, 2)).all()


def counters(inferences, batches, total):
    parts = ("queue", "compute_input", "compute_infer", "compute_output", "total")
    return ModelStatistics(
        inferences=inferences, executions=sum(n for n, _ in batches.values()), failures=0,
        ns=dict.fromkeys(parts, total), batches=batches,
    )  # fmt: skip


def test_what_a_run_added():
    before = {"a": counters(10, {1: (10, 10_000_000)}, 5_000_000), "idle": counters(3, {1: (3, 1)}, 1)}
    after = {
        "a": counters(30, {1: (10, 10_000_000), 4: (5, 20_000_000)}, 25_000_000),
        "idle": counters(3, {1: (3, 1)}, 1),
    }
    found = added(before, after)
    assert list(found) == ["a"]
    facts = found["a"].facts()
    assert (
        facts["source"] == "triton"
        and facts["ms"]["queue"] == 1.0
        and facts["mean_batch"] == 4.0
        and facts["batches"] == {"4": [5, 4.0]}
    )


METRICS = """# HELP hstu_trt_begun_total Requests
hstu_trt_begun_total{model="ranking_fused"} 30
hstu_trt_waited_seconds_total{model="ranking_fused"} 0.6
hstu_trt_shed_total{model="ranking_fused"} 4
hstu_trt_batches_total{model="ranking_fused",users="1"} 10
hstu_trt_batches_total{users="4",model="ranking_fused"} 5
hstu_trt_batch_seconds_total{model="ranking_fused",users="1"} 0.1
hstu_trt_batch_seconds_total{users="4",model="ranking_fused"} 0.1
hstu_trt_tables_info{model="ranking_fused",form="x"} 1
nv_inference_queue_duration_us{model="ranking_fused",version="1"} 150000
nv_inference_queue_duration_us{model="hstu",version="1"} 90000
hstu_trt_begun_total{model="embedding_lookup"} 0
hstu_trt_waited_seconds_total{model="embedding_lookup"} 0
nv_cpu_utilization 0.5
"""


def test_waits_and_batches_by_our_metrics():
    found = load_statistics(METRICS)
    assert list(found) == ["ranking_fused"]
    facts = found["ranking_fused"].facts()
    assert facts["source"] == "hstu_trt"
    assert (facts["inferences"], facts["executions"], facts["failures"]) == (
        30,
        15,
        4,
    )
    assert facts["ms"]["queue"] == 25 and facts["mean_batch"] == 2
    assert facts["ms"]["compute_infer"] == pytest.approx(1e3 * (0.1 + 4 * 0.1) / 30, abs=1e-3)
    assert facts["batches"] == {"1": [10, 10.0], "4": [5, 20.0]}
    curve = fit_curve([facts["batches"]], max_batch=4, scatter=0.0)
    assert curve.at(1) == 0.01 and curve.at(4) == 0.02


SMI = ["35, 71000, 512.30, 1755, 55", "41, 71010, 610.00, 1700, 58", "[N/A], 71010, [N/A], 1700, 58", ""]


def test_a_gpu_s_figures_are_summarised():
    gpu = machine_watch.summarise_gpu(SMI)
    assert gpu["utilisation"] == {"median": 38.0, "max": 41.0} and gpu["power_w"]["max"] == 610.0
    assert gpu["memory_mib"]["median"] == 71010.0
    assert machine_watch.summarise_gpu([]) is None


def test_a_machine_without_gpu_says_null(monkeypatch):
    monkeypatch.setattr(machine_watch.shutil, "which", lambda name: None)
    with machine_watch.MachineWatch() as watch:
        sum(range(3_000_000))
    assert watch.facts()["gpu"] is None and machine_watch.environment()["gpu"] is None
    assert machine_watch._busy_share((10, 100), (40, 160)) == 0.5


def test_scores_are_judged(fake_model):
    rng = np.random.default_rng(1)
    expected = [rng.uniform(0.1, 0.9, (8, 1)).astype(np.float32) for _ in range(40)]
    good = judge(fake_model, expected, expected)
    assert not good.failures and good.figures["gates_failed"] == 0 and "gates kept" in good.text
    wrong = judge(fake_model, [part[::-1] for part in expected], expected)
    assert wrong.figures["gates_failed"] == len(wrong.failures) >= 3 and "MISSED" in wrong.text
    lost = [part * np.nan for part in expected[:1]] + expected[1:]
    assert judge(fake_model, lost, expected).failures


def test_a_measured_scenario_becomes_a_row(fake_model):
    requests = generate_requests(fake_model, profile="ci", count=16, seed=1)
    run = summarise_of_law()
    outcome = Outcome(scenario="open", setting="100/s", repeated=Repeated(runs=[run, run]))
    subject = Subject(
        case="c", served="ranking", provenance=Provenance.here("CPU", {}, "abc"),
        checks=Checks(figures={"gates": 3.0, "gates_failed": 1.0}, failures=("x",)),
        workload=workload_facts(requests), deployment={},
    )  # fmt: skip
    row = row_of(subject, Measured(outcome=outcome, steps={"ranking": counters(10, {1: (10, 10)}, 10)}))
    again = ResultRow.from_json(json.loads(row.to_json()), "here")
    assert again == row and row.variant == "ranking open 100/s" and row.details["run"]["requested_per_s"] == 100
    assert (
        row.details["workload"]["requests"] == 16 and sum(row.details["workload"]["history_histogram"].values()) == 16
    )
    assert "1 of 3 gates MISSED" in load_table([row]) and "ranking" in steps_table([row])
    assert score_verdict(dataclasses.replace(row, checks={})) == "UNCHECKED"


def summarise_of_law():
    from hstu_trt.bench.load.client import Records

    due = np.arange(2000) / 100
    records = Records(due=due, sent=due, done=due + 0.01, which=np.zeros(2000, int), errors={}, cpu_s=1.0)
    return summarise(records, requested_per_s=100)


def ratio_row(scenario, **ratios):
    row = load_row(scenario)
    names = {name.replace("__", " "): value for name, value in ratios.items()}
    return dataclasses.replace(row, ratio_to=names)


def beside(offline, p99):
    """Rows whose weaker ratio to the two baselines is the given one."""
    offline_row = ratio_row("offline", pytorch_eager=9.0, pytorch_eager_per_core=offline)
    return [offline_row, ratio_row("open", pytorch_eager__p99=p99, pytorch_eager_per_core__p99=9.0)]


@pytest.mark.parametrize(
    ("offline", "p99", "missing"),
    [(2.0, 1.2, 0), (1.4, 1.2, 1), (2.0, 0.9, 1), (1.0, 0.5, 2)],
)
def test_the_better_baseline_decides(offline, p99, missing):
    assert len(side_by_side.shortfalls(beside(offline, p99), 1.5)) == missing


def test_ratios_are_taken_within_a_round():
    def contender(served, p99, per_s):
        runs = [
            types.SimpleNamespace(at=lambda _, v=value: v, per_s=rate) for value, rate in zip(p99, per_s, strict=True)
        ]
        return side_by_side.Contender(served=served, bench=None, runs=None, results={"offline": runs, "open": runs})

    ours, theirs = contender("ranking", [10, 20, 30], [100, 50, 25]), contender("eager", [20, 40, 60], [50, 25, 12.5])
    assert side_by_side.ratios(ours, theirs, "offline") == {"eager p99": 2.0, "eager": 2.0}
    assert side_by_side.ratios(ours, theirs, "open") == {"eager p99": 2.0}


def test_what_others_do_is_told_from_our_own_work():
    """A child that burns a CPU is ours, so the rest is less than all that was busy."""
    with machine_watch.MachineWatch() as watch:
        burner = subprocess.Popen([sys.executable, "-c", "import time\nwhile True: time.time()"])
        try:
            eventually(lambda: machine_watch._family_ticks() - watch._ours > 20)  # hundredths of a second
        finally:
            burner.kill()
            burner.wait()
    facts = watch.facts()
    assert 0 <= facts["others_cpu"] <= facts["cpu_busy"]
    with machine_watch.MachineWatch(own_server=False) as watch:
        pass
    assert watch.facts()["others_cpu"] is None


@pytest.mark.parametrize(("others", "flags"), [(0.05, []), (0.4, ["shared machine"]), (None, [])])
def test_a_shared_machine_is_flagged(fake_model, others, flags):
    requests = generate_requests(fake_model, profile="ci", count=4, seed=1)
    subject = Subject(
        case="c", served="ranking", provenance=Provenance.here("CPU", {}, "abc"),
        checks=Checks(figures={}, failures=()), workload=workload_facts(requests), deployment={},
    )  # fmt: skip
    outcome = Outcome(scenario="open", setting="", repeated=Repeated(runs=[summarise_of_law()]))
    assert row_of(subject, Measured(outcome=outcome, machine={"others_cpu": others})).details["flags"] == flags
