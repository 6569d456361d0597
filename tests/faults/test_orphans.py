"""Nothing outlives ``hstu-trt serve``, however it ends; the port is free for the next one."""

import os
import signal
import socket
import time

import pytest
from served import Serve
from supervised import is_running

from hstu_trt.serving.supervision.processes import SERVER, processes_of
from hstu_trt.serving.supervision.undertaker import GRACE_S

pytestmark = [pytest.mark.triton, pytest.mark.faults]

# what hangs while serve is killed
HANGING = [(), ("hstu",), (SERVER, "ranking_fused")]


@pytest.mark.parametrize("hanging", HANGING, ids=" and ".join)
def test_server_and_stubs_end_with_serve(deployment, hanging):
    serve = Serve(deployment, "--no-restart")
    processes = {process.name: process.pid for process in processes_of(serve.facts["pid"])}
    assert len(processes) == 5
    for name in hanging:
        os.kill(processes[name], signal.SIGSTOP)
    serve.stop(signal.SIGKILL)
    began, deadline = time.monotonic(), time.monotonic() + GRACE_S + 30
    while (left := [name for name, pid in processes.items() if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    print(f"all ended after {time.monotonic() - began:.1f} s")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(serve.url.rpartition(":")[2])))
