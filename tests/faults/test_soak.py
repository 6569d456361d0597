"""Long runs: nothing may grow. The trend test must find a leak, and be silent on noise."""

import numpy as np
import pytest

from hstu_trt.bench.load.process_watch import Usage, gpu_bytes
from hstu_trt.bench.result_rows import read_rows
from hstu_trt.bench.serving import soak
from hstu_trt.contract.cli import main as cli

MIB = 1 << 20


def samples(seconds=180.0, count=360, seed=0, **grows):
    """Usage of a server with noise as seen: steps of the allocator while it warms up, spikes, a handle more or less."""
    random = np.random.default_rng(seed)
    found = []
    for moment in np.linspace(0, seconds, count):
        share = moment / seconds
        warm = min(1.0, 5 * share)
        values = {
            "memory_bytes": 500 * MIB * (0.8 + 0.2 * warm)
            + random.normal(0, 2 * MIB)
            + 80 * MIB * (random.random() < 0.1),
            "handles": 300 + random.integers(0, 6),
            "threads": 90 + random.integers(0, 3),
            "shared_bytes": 20 * MIB * warm,
            "processes": 6,
            "gpu_bytes": 12_000 * MIB * (0.9 + 0.1 * warm),
        }
        found.append((moment, Usage(**{k: int(v + grows.get(k, 0) * max(0, share - 0.25)) for k, v in values.items()})))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_noise_spikes_and_warm_up_are_no_leak(seed):
    assert [g.name for g in soak.trends(samples(seed=seed)) if g.is_leak] == []


LEAKS = {
    "memory_bytes": 40 * MIB,
    "handles": 20,
    "threads": 10,
    "shared_bytes": 8 * MIB,
    "processes": 2,
    "gpu_bytes": 300 * MIB,
}


@pytest.mark.parametrize(("name", "grows"), LEAKS.items(), ids=LEAKS.keys())
def test_a_leak_of_each_kind_is_found(name, grows):
    """As much as this from the end of the warm-up to the end."""
    assert [g.name for g in soak.trends(samples(**{name: grows / 0.75})) if g.is_leak] == [name]


def test_a_long_run_finds_a_smaller_leak():
    """200 bytes per request at 40 requests per second are 27 MiB in the whole of half an hour, less the warm-up."""
    leak = 600 * 40 * 1800 * 0.75
    assert [g.name for g in soak.trends(samples(1800.0, **{"memory_bytes": leak})) if g.is_leak] == ["memory_bytes"]


def test_what_was_missed_is_said():
    leak = soak.Growth(name="handles", median=300.0, growth=25.0, allowed=8.0)
    fine = soak.Growth(name="threads", median=90.0, growth=-1.0, allowed=4.0)
    found = soak.Soaked(
        seconds=180, requests=9, shed=0, failed={"INTERNAL: broken": 2}, refreshes=3, growths=[fine, leak]
    )
    first, second = found.missed()
    assert "handles grew by 25" in first and "2 requests failed: INTERNAL: broken" in second


@pytest.mark.parametrize(
    ("said", "code", "found"), [("512\\n1024\\n", 0, 1536 * MIB), ("[N/A]\\n", 0, 0), ("no driver", 9, 0)]
)
def test_memory_of_gpus(tmp_path, monkeypatch, said, code, found):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{said}'\nexit {code}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu_bytes() == found


def test_a_running_server_goes_with_its_process(tmp_path, capsys):
    assert cli(["bench", "soak", "--model", str(tmp_path), "--url", "127.0.0.1:1"]) == 2
    assert "--url and --server-pid go together" in capsys.readouterr().err


def test_too_short_a_run_is_refused(exported, capsys):
    assert cli(["bench", "soak", "--model", str(exported("fp32")), "--seconds", "3"]) == 2
    assert "--seconds 3: a soak takes at least 20" in capsys.readouterr().err


@pytest.mark.triton
@pytest.mark.faults
def test_three_minutes_of_load_and_refreshes_leave_nothing_behind(exported, tmp_path, capsys):
    """The trend is the promise and holds on any machine: it compares a server with itself.

    Requests are few, so that two busy cores keep up; not one may fail.
    """
    out = tmp_path / "rows.jsonl"
    code = soak.main(["--model", str(exported("fp32")), "--seconds", "180", "--rate", "30", "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    (row,) = read_rows([out])
    assert row.checks["failed"] == 0 and row.checks["refreshes"] >= 10 and row.checks["requests"] > 3000
