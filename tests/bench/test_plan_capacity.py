"""The capacity planner: queues against theory and against a real run, and the arithmetic of machines."""

import json
import math
import queue
import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
from load_rows_made import a_run
from waiting import holds_eventually

from hstu_trt.bench.load.client import OpenLoop, drive, poisson
from hstu_trt.bench.load.scenarios import Bound
from hstu_trt.bench.load.stats import summarise
from hstu_trt.bench.plan import verb as plan
from hstu_trt.bench.plan.capacity import Demand, Fleet, placements
from hstu_trt.bench.plan.queueing import ServiceCurve, fit_curve, predict_ms, rate_within, scatter_of, simulate
from hstu_trt.bench.result_rows import RESULTS, append_rows, latest, read_rows
from hstu_trt.contract.errors import ConfigError
from hstu_trt.tables.popularity import zipf_share


def test_one_server_without_batches_is_m_d_1():
    """Pollaczek and Khinchine: mean waiting time = load / (2 (1 - load)) services."""
    arrivals = poisson(100.0, 1000.0, seed=3)
    latency = simulate(arrivals, [ServiceCurve(seconds={1: 0.006})])
    assert latency.mean() == pytest.approx(0.006 * (1 + 0.6 / (2 * 0.4)), rel=0.05)


def test_scatter_is_m_g_1():
    sigma = 0.5
    curve = ServiceCurve(seconds={1: 0.006}, scatter=sigma)
    latency = simulate(poisson(100.0, 2000.0, seed=3), [curve])
    squared_cv = math.exp(sigma**2) - 1
    assert latency.mean() == pytest.approx(0.006 * (1 + (1 + squared_cv) * 0.6 / (2 * 0.4)), rel=0.06)


def test_batches_take_all_that_wait():
    arrivals = np.array([0.0, 0.001, 0.002, 0.003, 0.004])
    latency = simulate(arrivals, [ServiceCurve(seconds={1: 0.01, 4: 0.02}, max_batch=4)])
    assert latency == pytest.approx([0.01, 0.029, 0.028, 0.027, 0.026])
    limited = simulate(arrivals, [ServiceCurve(seconds={1: 0.01, 2: 0.012}, max_batch=2)])
    assert limited == pytest.approx([0.01, 0.021, 0.02, 0.031, 0.03])


def test_two_servers_share_a_queue_and_stages_follow_each_other():
    arrivals = np.zeros(2)
    assert simulate(arrivals, [ServiceCurve(seconds={1: 0.01}, servers=2)]) == pytest.approx([0.01, 0.01])
    chain = [ServiceCurve(seconds={1: 0.01}), ServiceCurve(seconds={1: 0.03})]
    assert simulate(arrivals, chain, overhead_s=0.001) == pytest.approx([0.041, 0.071])


@pytest.mark.parametrize(("batch", "ms"), [(1, 2), (2, 3), (5, 4.5), (8, 6), (12, 8)])
def test_a_curve_is_interpolated_and_goes_on(batch, ms):
    curve = fit_curve([{"1": [40, 2.0], "2": [30, 3.0]}, {"8": [30, 6.0], "5": [1, 50.0]}], max_batch=16, scatter=0)
    assert curve.at(batch) == pytest.approx(ms / 1e3)


def test_scatter_from_percentiles():
    sigma = 0.4
    assert scatter_of(1.0, math.exp(1.2816 * sigma)) == pytest.approx(sigma) and scatter_of(2.0, 1.0) == 0


def test_the_highest_rate_keeps_the_bound():
    curves = [ServiceCurve(seconds={1: 0.005, 8: 0.012}, max_batch=8)]
    bound = Bound(ms=30.0)
    rate = rate_within(curves, bound, overhead_s=0.001)
    assert (
        predict_ms(curves, rate, overhead_s=0.001)["p99"]
        <= 30
        < predict_ms(curves, rate * 1.1, overhead_s=0.001)["p99"]
    )


class BatchServer:
    """A real server thread that takes all waiting requests, up to 8, and sleeps 10 ms + 2 ms for each."""

    def __init__(self):
        self.waiting = queue.SimpleQueue()
        threading.Thread(target=self.work, daemon=True).start()

    def prepare(self, request):
        return request

    def submit(self, request):
        answer = Future()
        self.waiting.put(answer)
        return answer

    def work(self):
        while True:
            batch = [self.waiting.get()]
            while len(batch) < 8 and not self.waiting.empty():
                batch.append(self.waiting.get())
            time.sleep(0.010 + 0.002 * len(batch))
            for answer in batch:
                answer.set_result(None)


@pytest.mark.parametrize("rate", [60.0, 180.0])
def test_the_simulation_tells_what_a_real_run_measures(rate):
    """Both see the same arrivals; a busy machine stretches sleeps, so the bounds are wide, and it is asked again."""
    arrivals = poisson(rate, 1.5, seed=8)
    curve = ServiceCurve(seconds={1: 0.012, 8: 0.026}, max_batch=8)
    simulated = simulate(arrivals, [curve], overhead_s=0.0005) * 1e3

    def agree():
        loop = OpenLoop(offsets_s=arrivals, most_waiting=500)
        measured = summarise(drive(BatchServer(), [None], loop), requested_per_s=rate)
        assert measured.at(50) == pytest.approx(np.percentile(simulated, 50), rel=0.35)
        assert measured.at(90) == pytest.approx(np.percentile(simulated, 90), rel=0.35)

    holds_eventually(agree)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.05, 1.2])
def test_the_covered_share_is_that_of_the_sum(exponent):
    weights = np.arange(1, 200_001, dtype=float) ** -exponent
    exact = weights[:20_000].sum() / weights.sum()
    assert zipf_share(20_000, 200_000, exponent) == pytest.approx(exact, abs=0.03)
    assert zipf_share(1000, 1000, exponent) == pytest.approx(1.0) and zipf_share(0, 1000, exponent) == 0


DEMAND = Demand(per_s=100_000, table_bytes=1.024e12, ids_per_request=9048, row_bytes=1024, zipf=1.05)
FLEET = Fleet(per_gpu=600, headroom=0.3, gpus_per_host=8, gpu_gib=60, host_gib=1500, gpu_hour=3, host_hour=2)


def test_a_terabyte_at_a_hundred_thousand_per_second():
    whole, spread = placements(DEMAND, FLEET)
    assert (whole.name, whole.gpus, whole.hosts) == ("whole in each host's memory", 240, 30)
    assert whole.per_hour == 240 * 3 + 30 * 2 and whole.network_gb_s == 0
    assert spread.host_gib == pytest.approx(2 * 1.024e12 / 2**30 / 30) and spread.network_gb_s > 0
    assert spread.hit_share == pytest.approx(0.91, abs=0.01) and spread.bus_gb_s * 8 > spread.network_gb_s


def test_small_tables_lie_on_each_gpu_and_large_ones_need_hosts_for_memory():
    small = Demand(**{**vars(DEMAND), "table_bytes": 1e10})
    assert next(one.name for one in placements(small, FLEET)) == "whole on each GPU"
    thin = Fleet(**{**vars(FLEET), "host_gib": 8.0})
    (only,) = placements(DEMAND, thin)
    assert only.hosts == math.ceil(2 * 1.024e12 / 2**30 / 8) and only.gpus == 8 * only.hosts


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fleet(**{**vars(FLEET), "headroom": 1.0}),
        lambda: Demand(**{**vars(DEMAND), "per_s": 0}),
        lambda: ServiceCurve(seconds={}),
        lambda: fit_curve([], max_batch=1, scatter=0),
    ],
)
def test_impossible_inputs_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_the_verb_prints_its_assumptions(tmp_path, capsys):
    assert plan.main(["--rate", "100000", "--per-gpu", "600", "--gpu-hour", "3", "--host-hour", "2"]) == 0
    said = capsys.readouterr().out
    assert "ASSUMED, not measured" in said and "240 GPUs in 30 hosts" in said and "Zipf 1.05" in said


def test_the_verb_takes_the_measured_rate_or_simulates_it(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    append_rows(path, a_run())
    assert plan.main(["--rate", "1000", "--rows", str(path)]) == 0
    said = capsys.readouterr().out
    assert "simulated queue against measured runs" in said and "measured: ranking_fused server p99 <= 80 ms" in said
    assert plan.main(["--rate", "1000", "--rows", str(path), "--slo-ms", "20", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["source"].startswith("simulated") and len(facts["checked"]) == 4


def test_rows_or_a_rate_but_not_both():
    with pytest.raises(ConfigError, match="either --rows"):
        plan.main(["--rate", "1"])


def test_rows_of_the_flavour_cuda_are_not_read_by_tritons_service_times(tmp_path):
    """Triton sees a request for the moment of its hand-over; offline throughput and the lone request tell more."""
    rows = [json.loads(line) for line in (RESULTS / "serve_cpu.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["case"] == "debug fp32 cpu, profile ci, seed 1001"]
    for row in rows:
        row["details"]["deployment"]["flavour"] = "cuda"
        for step in row["details"]["steps"].values():
            step["batches"] = {size: (count, 1e-3) for size, (count, _) in step["batches"].items()}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_rows([tmp_path / "rows.jsonl"])
    model = plan.model_of(list(latest(found).values()), "ranking_fused", max_batch=32)
    offline = max(row.per_s for row in found if row.variant == "ranking_fused offline 64 in flight")
    assert model.curves[0].at(10) == pytest.approx(10 / offline)
    predicted = model.predict(0.95 * offline)
    single = next(row for row in found if row.variant == "ranking_fused single").details["run"]["latency_ms"]
    lightly = model.predict(1.0)["p50"]
    assert lightly == pytest.approx(single["mean"], rel=0.25) and lightly < predicted["p50"]
    without = [row for row in found if "offline" not in row.variant]
    with pytest.raises(ConfigError, match="no row of scenario offline"):
        plan.model_of(without, "ranking_fused", max_batch=32)


def test_rows_whose_batches_end_at_the_hand_over_are_refused():
    rows = latest(read_rows([RESULTS / "serve_cpu.jsonl"])).values()
    known = [row for row in rows if row.case == "debug fp32 cpu, profile ci, seed 1001"]
    assert plan.model_of(known, "ranking_fused", max_batch=32).curves, "older rows can be read"
    for row in known:
        for step in row.details["steps"].values():
            step["source"] = "triton"
    with pytest.raises(ConfigError, match="end where it takes requests in"):
        plan.model_of(known, "ranking_fused", max_batch=32)
