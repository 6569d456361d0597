"""``hstu-trt bench overload``: a short run of it, and what it makes of records."""

import os
import subprocess
import sys

import numpy as np
import pytest

from hstu_trt.bench.load.client import Records
from hstu_trt.bench.load.process_watch import family, usage
from hstu_trt.bench.load.stats import SHED, summarise
from hstu_trt.bench.result_rows import read_rows
from hstu_trt.bench.serving import overload
from hstu_trt.bench.serving.overload_load import answers_per_s, recovery_s, split
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.signature import OVERLOADED

pytestmark = pytest.mark.faults
MODELS = ("ranking", "ranking_fused")


@pytest.mark.triton
def test_a_run_under_overload_is_measured_and_written_down(exported, tmp_path, capsys, monkeypatch):
    """The whole verb, short. Its bounds on time are for a quiet machine: the rows tell which were kept.

    A toy model is no measure of speed under overload: refusing a request costs about what serving one does, on the
    same two cores as the client, so only what holds on any machine is asserted.
    """
    deployment = assemble(read_model_folder(exported("fp32")), tmp_path / "deployment", Options())
    out = tmp_path / "rows.jsonl"
    core, parted = str(min(os.sched_getaffinity(0))), []
    monkeypatch.setattr(overload, "pin", lambda processes, cpus: parted.append((set(processes), cpus)))
    argv = ["--deployment", str(deployment.path), "--seconds", "2", "--connections", "100", "--out", str(out)]
    argv += ["--clients", "2", "--server-cpus", core, "--client-cpus", core]
    code = overload.main([*argv, "--refusal-ms", "2000", "--commit", "abc"])
    rows = read_rows([out])
    assert [row.variant for row in rows] == [f"{model} at 3 x peak" for model in MODELS]
    assert code == (1 if any(row.details["missed"] for row in rows) else 0)
    (server, its_cores), (client, our_cores) = parted
    assert client == {os.getpid()} and not server & client and len(server) > 4
    assert its_cores == our_cores == {int(core)}
    for row in rows:
        checks, setting = row.checks, row.details["setting"]
        assert (setting["clients"], setting["server_cpus"], setting["client_cpus"]) == (2, core, core)
        assert checks["failed"] == 0 and checks["refused"] > 0 and checks["accepted"] > 0
        assert checks["connections_answered"] + checks["connections_shed"] == 100
        assert checks["throughput_share"] > 0.2 and checks["memory_growth"] < 0.5
    assert "throughput_share" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "127.0.0.1:1"], "--url and --server-pid go together"),
        (["--server-pid", "1"], "--url and --server-pid go together"),
        (["--factor", "1"], "an overload run needs"),
        (["--clients", "0"], "--clients: must be >= 1, got 0"),
        (["--client-cpus", "none"], "write them as 0-7,12"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        overload.main(["--deployment", str(tmp_path), *options])


def records(done, errors, *, rate=100.0):
    due = np.arange(len(done)) / rate
    return Records(
        due=due, sent=due, done=due + np.asarray(done), which=np.zeros(len(done), int), errors=errors, cpu_s=0.0
    )


def test_accepted_refused_and_failed_requests_are_told_apart():
    shed, broken = f"UNAVAILABLE: {OVERLOADED}4 requests wait already", "INTERNAL: broken"
    found = records(np.full(400, 0.02), {n: shed for n in range(0, 200, 2)} | {3: broken, 301: broken})
    parts = split(found, 0.0, 2.0)
    assert (len(parts.accepted_ms), len(parts.refused_ms), parts.failed) == (99, 100, {broken: 1})
    assert answers_per_s(found, 0.0, 2.02) == pytest.approx(99 / 2.02)
    result = summarise(found)
    assert result.shed == 100 and result.errors == {broken: 2} and set(result.flags) >= {SHED, "errors"}


@pytest.mark.parametrize(
    ("slow_until", "shed_until", "recovered"),
    [(0, 0, 0.0), (240, 0, 0.5), (0, 251, 0.75), (400, 0, float("inf"))],
    ids=["at once", "slow for a while", "refused for a while", "never"],
)
def test_recovery_counts_from_the_end_of_the_burst(slow_until, shed_until, recovered):
    """100 requests per second, the burst ends after 2 s; normal is 10 ms."""
    latency = np.where(np.arange(400) < slow_until, 0.5, 0.01)
    shed = {n: f"UNAVAILABLE: {OVERLOADED}" for n in range(200, shed_until)}
    assert recovery_s(records(latency, shed), 2.0, 20.0) == recovered


def test_a_family_of_processes_is_found_and_counted():
    child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1, text=True)
    assert child.stdout.readline() == "up\n"
    assert {os.getpid(), child.pid} <= set(family(os.getpid()))
    alone, both = usage(child.pid), usage(os.getpid())
    assert alone.processes == 1 and alone.handles >= 3 and alone.threads >= 1 and alone.memory_bytes > 1e6
    assert both.processes >= 2 and both.memory_bytes > alone.memory_bytes
    child.communicate("\n", timeout=60)
    assert usage(child.pid).processes == 0
