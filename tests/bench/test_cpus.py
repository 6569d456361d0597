"""Cores for a server and its clients: how they are written, and who is kept on them."""

import os
import subprocess
import sys

import pytest

from hstu_trt.bench.load.cpus import cpu_set, pin
from hstu_trt.bench.load.process_watch import family
from hstu_trt.contract.errors import ConfigError

# Two threads, and a process below it, all of which are there when it says so.
SCRIPT = """
import subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1)
child.stdout.readline()
print("up", flush=True)
input()
child.kill()
"""


@pytest.mark.parametrize(
    ("text", "cpus"), [(None, None), ("3", {3}), ("0-2", {0, 1, 2}), ("0-1,5,7-7", {0, 1, 5, 7}), ("2,2", {2})]
)
def test_how_cores_are_written(monkeypatch, text, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert cpu_set(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "0-", "-1", "3-1", "0:1", "8", "0-8"])
def test_cores_that_are_not_ours(monkeypatch, text):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    with pytest.raises(ConfigError, match="CPU cores"):
        cpu_set(text)


def test_threads_and_processes_are_kept_on_cores():
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stdin=-1, stdout=-1, text=True)
    assert child.stdout.readline() == "up\n"
    core = max(os.sched_getaffinity(0))
    members = family(child.pid)
    pin([*members, 1 << 30], frozenset({core}))
    threads = [int(thread) for pid in members for thread in os.listdir(f"/proc/{pid}/task")]
    assert len(members) == 2 and len(threads) == 3
    assert all(os.sched_getaffinity(thread) == {core} for thread in threads)
    assert os.sched_getaffinity(0) != {core} or os.cpu_count() == 1
    child.communicate("\n", timeout=20)
