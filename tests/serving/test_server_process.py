"""The child processes of a server, with small programs in its place: what is left of them, and what they show."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from waiting import eventually

from hstu_trt.serving.operating import hide_key
from hstu_trt.serving.supervision.processes import _stat

# A server whose stub outlives it, in its session.
SERVER = """
import subprocess, sys, time
stub = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
print(stub.pid, flush=True)
time.sleep(100)
"""
# The first process of a container gets the children that others leave behind.
FIRST = """
import ctypes, subprocess, sys
from pathlib import Path
assert ctypes.CDLL(None).prctl(36, 1) == 0  # PR_SET_CHILD_SUBREAPER
"""
SERVE = f"""{FIRST}
from hstu_trt.serving.server import LaunchPlan
from hstu_trt.serving.server_process import ServerProcess
log = Path(sys.argv[1])
plan = LaunchPlan(
    command=(sys.executable, "-c", {SERVER!r}), log=log, regions="hstu_trt_no_such_", address="", grpc_port=0
)
process = ServerProcess(plan)
while not log.read_text().endswith("\\n"):
    assert process.exit_code is None, log.read_text()
getattr(process, sys.argv[2])()
print(process.pid, log.read_text(), flush=True)
sys.stdin.read()
"""
# A serve that was killed leaves its server to the fleet.
KILLED_SERVE = """
import subprocess, sys
command, quiet = [sys.executable, "-c", "import time; time.sleep(100)"], subprocess.DEVNULL
server = subprocess.Popen(command, start_new_session=True, stdout=quiet, stderr=quiet)
print(server.pid)
"""
FLEET = f"""{FIRST}
from hstu_trt.serving.fleet.replica import Replica
serve = subprocess.run([sys.executable, "-c", {KILLED_SERVE!r}], capture_output=True, text=True, check=True)
replica = Replica(None, print)
replica._servers = {{int(serve.stdout)}}
replica._kill_servers()
print(serve.stdout, flush=True)
sys.stdin.read()
"""


def are_gone(script, *arguments):
    """Whether the processes that a script has ended, as it says in a line, are in no table while it still runs."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        ended = list(map(int, first.stdout.readline().split()))
        return ended != [] and not any(map(_stat, ended))


@pytest.mark.parametrize("end", ["kill", "drain"])
def test_nothing_is_left_to_the_first_process_of_a_container(tmp_path, end):
    """Stubs that nobody asks after stay in the table of processes, four more at each restart."""
    assert are_gone(SERVE, tmp_path / "log", end)


def test_nor_to_a_fleet_that_is_one():
    assert are_gone(FLEET)


KEY = "0123456789abcdef"


@pytest.fixture
def server():
    """A process with the key in its command line, as a server has it."""
    words = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(100)", f"x:admin-key={KEY}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield SimpleNamespace(pid=process.pid, plan=SimpleNamespace(command=words))
        process.kill()


def test_the_key_does_not_show(server, capsys):
    shown = Path(f"/proc/{server.pid}/cmdline")
    assert KEY in shown.read_text()
    hide_key(server.pid, server.plan)
    eventually(lambda: shown.read_text().endswith(f"x:admin-key={'x' * len(KEY)}\0"), shown.read_text)
    assert capsys.readouterr().err == ""


def test_where_it_stays_that_is_told(server, capsys):
    hide_key(2**22 + 1, server.plan)
    assert "stays in the process list" in capsys.readouterr().err
