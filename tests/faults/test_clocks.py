"""The wall clock may jump by hours: nothing waits, ends or restarts because of it."""

import ast
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import hstu_trt.serving
import hstu_trt.tables
from hstu_trt.serving.refresh import watching
from hstu_trt.serving.supervision import supervisor

pytestmark = pytest.mark.faults
WALL = {"time", "time_ns", "localtime", "gmtime", "ctime", "now", "utcnow", "today"}
# (file, function) that may ask the wall clock: what it writes is for people and metrics, and nothing is decided by it;
# but for a certificate, which is good until a date.
ALLOWED = {
    ("serving/models/cuda_stages.py", "serves"),
    ("serving/supervision/events.py", "write"),
    ("serving/fleet/command.py", "_tell"),
    ("serving/models/live_models.py", "serves"),
    ("serving/models/live_stages.py", "serves"),
    ("serving/supervision/supervisor.py", "Event"),
    ("serving/tls.py", "_check_dates"),
    ("tables/remote_push.py", "_begin"),
}
ROOMS = [Path(room.__path__[0]) for room in (hstu_trt.serving, hstu_trt.tables)]


def wall_clocks(source):
    """(innermost function or class, line) of calls that ask the wall clock."""

    def visit(node, scope):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WALL:
            owner = ast.unparse(node.func.value)
            if owner.split(".")[0] in ("time", "datetime", "date"):
                yield scope, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope)

    yield from visit(ast.parse(source), "module")


def test_only_what_people_read_comes_from_the_wall_clock():
    found = {
        (path.relative_to(room.resolve().parent).as_posix(), scope)
        for room in ROOMS
        for path in sorted(room.resolve().rglob("*.py"))
        for scope, _ in wall_clocks(path.read_text())
    }
    assert found == ALLOWED


def test_the_search_finds_wall_clocks():
    source = "import time\ndef wait():\n    return time.time() + datetime.datetime.now()\n\ntime.monotonic()\n"
    assert [scope for scope, _ in wall_clocks(source)] == ["wait", "wait"]


@pytest.fixture
def jumping(monkeypatch):
    """A wall clock that jumps forward and back by a day whenever somebody asks."""
    real, turn = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * (-1) ** next(turn))
    monkeypatch.setattr(time, "gmtime", lambda *_: time.struct_time((1970, 1, 1, 0, 0, 0, 3, 1, 0)))
    return monkeypatch


def test_a_watcher_polls_on(jumping, tmp_path):
    polls = threading.Semaphore(0)
    folder = SimpleNamespace(path=tmp_path, current=lambda: None)
    watcher = watching.Watcher(folder, 0.01, lambda version: None, lambda refresh: None, polls.release)
    watcher.start()
    assert all(polls.acquire(timeout=20) for _ in range(5))
    watcher.stop()


def test_durations_of_events_are_elapsed_time(jumping, tmp_path):
    """The date of an event is the wall clock's, its seconds are not."""
    told = []
    process = SimpleNamespace(pid=1, exit_code=-9, kill=lambda: None, plan=SimpleNamespace(url="127.0.0.1:1"))
    supervising = supervisor.Supervisor(
        launch=lambda: process, canaries=[], tell=told.append, record=tmp_path / "record", process=process
    )
    jumping.setattr(supervisor, "Watch", None)
    supervising._watch = lambda process: ("died", True)
    supervising._restart("died", time.monotonic(), 0)
    (event,) = told
    assert event.at == "1970-01-01T00:00:00Z"
    assert 0 <= event.seconds < 20
