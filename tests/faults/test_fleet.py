"""Replicas behind the gateway that are killed, added, drained and replaced under load; every answer is checked."""

import json
import os
import signal
import stat
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from fleets import ATOL, Load, children, running_fleet
from served import in_process, request_of
from supervised import is_running
from throwaway_ca import ThrowawayCa
from waiting import eventually

from hstu_trt.serving.answers import ServerError
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.fleet.gateway import children_of
from hstu_trt.serving.supervision.processes import processes_of
from hstu_trt.serving.tls import ClientTls

pytestmark = [pytest.mark.triton, pytest.mark.nginx, pytest.mark.faults]

CLIENTS = 4
NAME = "ranking.test"
# What is stopped is ended within 5 s, on a machine that is not loaded by others; a request that was in it comes again.
SILENT_S = 20.0


@pytest.fixture(scope="module")
def load(fleet, deployment):
    return Load(fleet.url, {"right": deployment}, clients=CLIENTS)


@pytest.fixture(autouse=True)
def whole(fleet):
    yield
    fleet.all_serve(2)


def only_right(load):
    answers, again = load.answers, load.failed_over
    load.sent.clear()
    print(f"{sum(answers.values())} requests, {again} of them sent again")
    assert set(answers) == {"right"}, answers


def first_running(fleet):
    """(the first replica, its server's process): on a busy machine a server may have been replaced a moment ago."""

    def found():
        victim = fleet.replicas()[0]
        servers = children(victim["pid"])
        return (victim, *servers) if len(servers) == 1 else None

    return eventually(found, "a replica with a server")


def test_commands_are_for_the_owner_alone(fleet):
    assert stat.S_IMODE(fleet.run.stat().st_mode) == 0o700
    assert stat.S_IMODE((fleet.run / "control.sock").stat().st_mode) == 0o600


def test_a_second_fleet_in_the_folder_is_refused(fleet):
    code, _, said = fleet.command("fleet", "--deployment", fleet.status()["current"]["deployment"])
    assert code == 1 and "a fleet already runs in" in said


def test_a_killed_server_costs_no_answer(fleet, load):
    """kill -9: what it was answering is answered by the other replica; it comes back on its own."""
    with load:
        load.wait_for_more()
        victim, server = first_running(fleet)
        os.kill(server, signal.SIGKILL)
        fleet.wait_for(lambda status: victim["address"] not in status["gets_requests"], "the gateway's list")
        load.wait_for_more()
        fleet.all_serve(2)
        load.wait_for_more()
    # Those that ran on it, and those that set out on a connection that one of two reloads closed, at most.
    assert load.failed_over <= 3 * CLIENTS
    only_right(load)


def test_a_killed_supervisor_costs_no_answer(fleet, load):
    """kill -9 of ``serve``: the fleet starts another one, and its server does not linger, half drained."""
    victim = fleet.replicas()[0]
    with load:
        load.wait_for_more()
        os.kill(victim["pid"], signal.SIGKILL)
        fleet.wait_for(lambda status: status["current"]["replicas"][0]["restarts"] > victim["restarts"], "a restart")
        fleet.all_serve(2)
        load.wait_for_more()
    only_right(load)


@pytest.mark.parametrize("who", ["server", "supervisor and server", "a worker of the gateway"])
def test_what_is_stopped_costs_no_answer(fleet, load, who):
    """SIGSTOP: it holds its connections and its port, so that only canaries and the kernel tell."""
    (victim, server), gateway = first_running(fleet), fleet.status()["gateway_pid"]
    stopped = {
        "server": [server],
        "supervisor and server": [victim["pid"], *(process.pid for process in processes_of(server))],
        # The latest: one of an older config may be about to end.
        "a worker of the gateway": [max(children_of(gateway))],
    }[who]
    with load:
        load.wait_for_more()
        struck = time.monotonic()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        fleet.wait_for(lambda status: not any(map(is_running, stopped)), "their end: they must not go on later")
        seconds = fleet.all_serve(2) + time.monotonic() - struck
        load.wait_for_more()
    slowest = max(each.ended - each.began for each in load.sent)
    print(f"{who} stopped: two replicas again after {seconds:.1f} s, the slowest answer took {slowest:.1f} s")
    assert slowest < SILENT_S
    only_right(load)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_gateway_that_dies_or_stops_comes_back(fleet, deployment, number):
    """On the same port; there is but one of it, so clients are refused meanwhile."""
    gateway = fleet.status()["gateway_pid"]
    os.kill(gateway, number)
    fleet.wait_for(lambda status: status["gateway_pid"] != gateway, "another gateway")
    request = request_of(deployment, 5, 3)

    def scores():
        with suppress(ServerError), RankingClient(fleet.url) as client:
            return [client.rank(request.user, request.history, request.candidates)]

    (found,) = eventually(scores, "the other gateway does not answer")
    assert found.shape[0] == 3


def test_adding_draining_and_replacing_cost_no_answer(fleet, load):
    """``replace``: as one command, the new one first, on the GPU of the old one if it has one."""
    first = fleet.replicas()[0]["name"]
    with load:
        load.wait_for_more()
        code, _, said = fleet.command("fleet", "add")
        assert code == 0, said
        load.wait_for_more()
        fleet.wait_for(lambda status: len(status["gets_requests"]) == 3, "the third replica")
        code, _, said = fleet.command("fleet", "drain", first)
        assert code == 0, said
        load.wait_for_more()
        replaced = fleet.replicas()[0]["name"]
        code, out, said = fleet.command("fleet", "replace", replaced, "--json")
        assert code == 0, said
        assert fleet.replicas()[-1]["name"] == json.loads(out)
        load.wait_for_more()
    names = [replica["name"] for replica in fleet.replicas()]
    assert len(names) == 2 and first not in names and replaced not in names
    starts, ends = (said.index(text) for text in ("gets requests", f"{replaced} gets no new requests"))
    assert starts < ends, "never one replica too few"
    # Each of four reloads can close a connection under a request that sets out on it.
    assert load.failed_over <= 4 * CLIENTS
    only_right(load)


def test_the_last_replica_is_not_drained(fleet):
    names = [replica["name"] for replica in fleet.replicas()]
    code, _, said = fleet.command("fleet", "drain", "r99")
    assert code == 2 and f"no replica 'r99'; there are {', '.join(names)}" in said


def devices(pid):
    """CUDA_VISIBLE_DEVICES of a running process."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next((word.partition("=")[2] for word in words if word.startswith("CUDA_VISIBLE_DEVICES=")), None)


def gpus_of(fleet):
    """Replica -> the GPU that it says it has, which every process of it must see, alone."""
    found = {}
    for replica in fleet.replicas():
        (server,) = children(replica["pid"])
        seen = {devices(process.pid) for process in (*processes_of(server),)} | {devices(replica["pid"])}
        assert seen == {replica["gpu"]}, replica
        found[replica["name"]] = replica["gpu"]
    return found


def test_one_server_per_gpu_behind_tls(deployment, tmp_path):
    """On a node with two: each replica sees its own; one that replaces another, or comes after it, takes its GPU."""
    base = 20_050 + os.getpid() % 120 * 100
    ca = ThrowawayCa(tmp_path / "ca")
    (cert, key), mine = ca.issue("gateway", usages=(ThrowawayCa.SERVER,)), ca.issue("client", names=())
    options = ["--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(ca.path)]
    options += ["--gpus", "GPU-a,GPU-b"]
    with running_fleet(deployment, tmp_path / "run", None, base, base + 1, *options) as fleet:
        request, tls = request_of(deployment, 5, 3), ClientTls(ca=ca.path, cert=mine[0], key=mine[1], server_name=NAME)
        with RankingClient(fleet.url, tls=tls) as client:
            scores = client.rank(request.user, request.history, request.candidates)
        assert np.abs(scores - in_process(deployment, "ranking", request)).max() <= ATOL
        with pytest.raises(ServerError, match="UNAUTHENTICATED"):
            RankingClient(fleet.url, tls=ClientTls(ca=ca.path, server_name=NAME))
        assert gpus_of(fleet) == {"r1": "GPU-a", "r2": "GPU-b"}
        assert fleet.command("fleet", "replace", "r1")[0] == 0
        assert gpus_of(fleet) == {"r2": "GPU-b", "r3": "GPU-a"}
        assert fleet.command("fleet", "drain", "r2")[0] == 0
        assert fleet.command("fleet", "add")[0] == 0
        assert gpus_of(fleet) == {"r3": "GPU-a", "r4": "GPU-b"}
