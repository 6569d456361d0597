"""Restarts: their delays, their record, and when they end."""

import json
from types import SimpleNamespace

import pytest

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.serving.supervision import supervisor as supervising
from hstu_trt.serving.supervision.supervisor import MOST_FAILURES, STABLE_CANARIES, GivenUpError, Supervisor, delay_s

pytestmark = pytest.mark.faults


def test_delays_grow_and_end():
    assert [delay_s(failures) for failures in range(8)] == [0, 1, 2, 4, 8, 16, 16, 16]


class DoneError(Exception):
    pass


class World:
    """Servers that live as told: a cause and how many canaries they answered; starts that fail as told."""

    def __init__(self, monkeypatch, tmp_path, lives, failing=()):
        self.now, self.slept, self.told, self.killed = 0.0, [], [], []
        self.lives, self.failing = list(lives), list(failing)
        self.started = 0
        monkeypatch.setattr(supervising, "time", self)
        monkeypatch.setattr(supervising, "Watch", self.watch)
        self.supervisor = Supervisor(
            launch=self.launch, canaries=[], tell=self.told.append, record=tmp_path / "restarts.json",
            process=self.process(),
        )  # fmt: skip

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds

    def strftime(self, form, when):
        return "then"

    def gmtime(self):
        return None

    def process(self):
        self.started += 1
        number = self.started
        plan = SimpleNamespace(url="", tls=None)
        return SimpleNamespace(plan=plan, pid=number, exit_code=None, kill=lambda: self.killed.append(number))

    def launch(self):
        self.now += 2
        error = self.failing.pop(0) if self.failing else None
        if error is not None:
            raise error
        return self.process()

    def watch(self, url, pid, canaries, patience, tls):
        if not self.lives:
            raise DoneError
        cause, right = self.lives.pop(0)
        return Watching(cause, right)


class Watching:
    def __init__(self, cause, right):
        self.cause, self.right = cause, right

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def look(self):
        return self.cause


WELL = STABLE_CANARIES


def run(world):
    with pytest.raises((DoneError, GivenUpError)) as caught:
        world.supervisor.run()
    return caught


def events(world):
    return [(event.event, event.cause, event.seconds, event.pid) for event in world.told]


def test_a_fault_is_answered_by_a_new_server(monkeypatch, tmp_path):
    world = World(monkeypatch, tmp_path, [("hstu died", WELL)])
    run(world)
    assert events(world) == [("fault", "hstu died", 0.0, 1), ("restarted", "hstu died", 2.0, 2)]
    assert world.killed == [1]
    assert world.slept == [0]
    record = json.loads((tmp_path / "restarts.json").read_text())
    assert record["restarts"] == 1
    assert [event["event"] for event in record["events"]] == ["fault", "restarted"]


def test_starts_that_fail_are_tried_again_ever_later(monkeypatch, tmp_path):
    damaged = ArtefactError("hstu.onnx does not match")
    world = World(monkeypatch, tmp_path, [("hstu died", WELL), ("again", WELL)], [damaged, damaged, None, None])
    run(world)
    assert [event.event for event in world.told] == [
        "fault", "restart_failed", "restart_failed", "restarted", "fault", "restarted"
    ]  # fmt: skip
    assert world.slept == [0, 1, 2, 0]


def test_a_cause_that_stays_ends_it_all(monkeypatch, tmp_path):
    world = World(monkeypatch, tmp_path, [("hstu died", WELL)], [ArtefactError("hstu.onnx does not match")] * 100)
    assert "hstu.onnx does not match" in str(run(world).value)
    assert world.slept == [0, 1, 2, 4, 8, 16][:MOST_FAILURES]
    assert world.supervisor.process is None


def test_a_loop_of_crashes_is_slowed_and_ended(monkeypatch, tmp_path):
    world = World(monkeypatch, tmp_path, [("hstu died", WELL - 1)] * 100)
    assert f"after {MOST_FAILURES} restarts; the last fault: hstu died" in str(run(world).value)
    assert world.slept == [1, 2, 4, 8, 16]


def test_a_server_that_stays_up_makes_up_for_it(monkeypatch, tmp_path):
    world = World(monkeypatch, tmp_path, [("x", 0), ("x", 0), ("x", WELL), ("x", 0)])
    run(world)
    assert world.slept == [1, 2, 0, 1]


@pytest.mark.parametrize("broken", ["record", "tell"])
def test_nothing_can_be_written(monkeypatch, tmp_path, broken):
    """A full disk, or a reader of the output that went away: the server is restarted all the same."""
    world = World(monkeypatch, tmp_path, [("hstu died", WELL)])

    def fail(event):
        raise BrokenPipeError

    if broken == "record":
        (tmp_path / "file").touch()
        world.supervisor.record = tmp_path / "file" / "restarts.json"
    else:
        world.supervisor.tell = fail
    run(world)
    assert world.started == 2


def test_connections_of_canaries_are_closed(monkeypatch, tmp_path):
    """A process that ends with a request under way on one of them would wait for it without end."""
    world, closed = World(monkeypatch, tmp_path, []), []
    world.supervisor.canaries = [SimpleNamespace(close=lambda name=name: closed.append(name)) for name in "ab"]
    world.supervisor.close()
    assert closed == ["a", "b"]
