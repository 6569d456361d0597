"""Nothing outlives ``hstu-trt serve``, however it ends; the port is free for the next one."""

import os
import signal
import socket
import time
from contextlib import suppress

import pytest
from served import Serve
from supervised import is_running, regions, regions_of
from waiting import eventually

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
    shared = regions_of(serve.facts["pid"])
    assert len(regions(shared)) >= 4, "one of each model"
    for name in hanging:
        os.kill(processes[name], signal.SIGSTOP)
    serve.stop(signal.SIGKILL)
    began = time.monotonic()

    def left():
        return [name for name, pid in processes.items() if is_running(pid)]

    eventually(lambda: not left(), left, GRACE_S + 30)
    print(f"all ended after {time.monotonic() - began:.1f} s")
    # A process that ends gives its memory back before it closes its sockets: on a busy machine that is seen.
    eventually(lambda: not regions(shared), lambda: regions(shared))
    eventually(lambda: is_free(int(serve.url.rpartition(":")[2])), "the port is held")


def is_free(port):
    """For a server, which may take a port over that holds the ends of old connections."""
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        probe.listen()
        return True
    return False
