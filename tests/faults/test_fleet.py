"""Replicas behind the gateway that are killed, added, drained and replaced under load; every answer is checked."""

import os
import signal
import stat

import pytest
from fleets import Load, children
from served import request_of

from hstu_trt.serving.client import RankingClient

pytestmark = [pytest.mark.triton, pytest.mark.nginx, pytest.mark.faults]

CLIENTS = 4


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
    print(f"{sum(answers.values())} requests, {again} of them sent a second time")
    assert set(answers) == {"right"}, answers


def test_commands_are_for_the_owner_alone(fleet):
    assert stat.S_IMODE(fleet.run.stat().st_mode) == 0o700
    assert stat.S_IMODE((fleet.run / "control.sock").stat().st_mode) == 0o600


def test_a_second_fleet_in_the_folder_is_refused(fleet):
    code, _, said = fleet.command("fleet", "--deployment", fleet.status()["current"]["deployment"])
    assert code == 1 and "a fleet already runs in" in said


def test_a_killed_server_costs_no_answer(fleet, load):
    """kill -9: what it was answering is answered by the other replica; it comes back on its own."""
    victim = fleet.replicas()[0]
    with load:
        load.wait_for_more()
        (server,) = children(victim["pid"])
        os.kill(server, signal.SIGKILL)
        fleet.wait_for(lambda status: victim["address"] not in status["gets_requests"], "the gateway's list")
        load.wait_for_more()
        fleet.all_serve(2)
        load.wait_for_more()
    assert load.failed_over <= CLIENTS  # those that ran on it at most
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


def test_a_killed_gateway_comes_back(fleet, deployment):
    gateway = fleet.status()["gateway_pid"]
    os.kill(gateway, signal.SIGKILL)
    fleet.wait_for(lambda status: status["gateway_pid"] != gateway, "another gateway")
    request = request_of(deployment, 5, 3)
    with RankingClient(fleet.url) as client:
        assert client.rank(request.user, request.history, request.candidates).shape[0] == 3


def test_adding_draining_and_replacing_cost_no_answer(fleet, load):
    first = fleet.replicas()[0]["name"]
    with load:
        load.wait_for_more()
        code, _, said = fleet.command("fleet", "add")
        assert code == 0, said
        load.wait_for_more()
        assert len(fleet.status()["gets_requests"]) == 3
        code, _, said = fleet.command("fleet", "drain", first)
        assert code == 0, said
        load.wait_for_more()
    assert first not in [replica["name"] for replica in fleet.replicas()]
    assert load.failed_over <= 2 * CLIENTS  # a reload can close a connection under a request that sets out on it
    only_right(load)


def test_the_last_replica_is_not_drained(fleet):
    names = [replica["name"] for replica in fleet.replicas()]
    code, _, said = fleet.command("fleet", "drain", "r99")
    assert code == 2 and f"no replica 'r99'; there are {', '.join(names)}" in said
