"""When a watch calls a server broken, and when slow: with stand-ins for server, canary and clock."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import eventually

from hstu_trt.bench.fuzz.watch import held_by
from hstu_trt.bench.load.process_watch import family
from hstu_trt.serving.fleet.gateway import children_of
from hstu_trt.serving.supervision import watch as watching
from hstu_trt.serving.supervision.canary import Reading, Verdict
from hstu_trt.serving.supervision.processes import SERVER, Watched, _stat, processes_of
from hstu_trt.serving.supervision.watch import Patience, Pulse

pytestmark = pytest.mark.faults
STEPS = ("embedding_lookup", "hstu", "mlp_head")
PATIENCE = Patience(every_s=0.5, idle_s=1.5, stuck_s=60.0)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Sent:
    reading = None
    cancelled = False

    def cancel(self):
        self.cancelled = True


class StandIn:
    """A canary that answers what it is told to, and processes and counts of a made-up server."""

    def __init__(self, monkeypatch, model="ranking"):
        self.clock, self.model, self.sent, self.forgotten = Clock(), model, [], 0
        monkeypatch.setattr(watching, "time", self.clock)
        self.counts = dict.fromkeys((*STEPS, "ranking", "ranking_fused"), 0)
        self.processes = [Watched(os.getpid(), name) for name in (SERVER, *STEPS, "ranking_fused")]
        for process in self.processes:
            process.active_at = self.clock.now
        self.pulse = Pulse(self, self.processes, PATIENCE)

    def send(self, deadline_s):
        self.sent.append(Sent())
        return self.sent[-1]

    def forget(self):
        self.forgotten += 1

    def answer(self, verdict, text=""):
        self.sent[-1].reading = Reading(model=self.model, verdict=verdict, seconds=0.1, text=text)

    def pass_time(self, seconds, moving=(), busy=(), statistics=True, verdict=None):
        """Looks ten times a second, while models finish requests and processes compute. The first trouble, if any."""
        for _ in range(round(seconds * 10)):
            self.clock.now += 0.1
            for name in moving:
                self.counts[name] += 1
            for process in self.processes:
                if process.name in busy:
                    process.active_at = self.clock.now
            if verdict is not None and self.sent:
                self.answer(verdict)
            if (trouble := self.pulse.look(lambda: dict(self.counts) if statistics else None)) is not None:
                return trouble
        return None


@pytest.fixture
def server(monkeypatch):
    return StandIn(monkeypatch)


def test_right_answers(server):
    assert server.pass_time(10, verdict=Verdict.RIGHT) is None
    assert 15 <= len(server.sent) <= 20
    assert server.pulse.right == pytest.approx(len(server.sent), abs=1)


@pytest.mark.parametrize(
    ("moving", "hung"),
    [((), "embedding_lookup"), (STEPS[:1], "hstu"), (STEPS[:2], "mlp_head")],
    ids=["first", "second", "third"],
)
def test_a_step_that_does_nothing_hangs(server, moving, hung):
    """Within 2 s of the fault, though the steps before it go on; the others compute."""
    before = server.clock.now
    trouble = server.pass_time(5, moving, busy={*STEPS, SERVER} - {hung})
    assert trouble is not None and trouble.startswith(f"{hung} hangs: no answer to a request to ranking for")
    assert server.clock.now - before <= 2


def test_a_queue_that_moves_on_is_not_a_hang(server):
    assert server.pass_time(300, moving=STEPS) is None
    assert len(server.sent) > 100
    assert all(sent.cancelled for sent in server.sent[:-1])


def test_a_long_request_is_not_a_hang(server):
    """It computes in ``hstu``; the steps around it have nothing to do."""
    assert server.pass_time(0.3, moving=STEPS[:1]) is None
    assert server.pass_time(50, busy=["hstu"]) is None
    assert server.pass_time(20, busy=["hstu"]).startswith("hstu is stuck: no answer")


def test_a_server_that_does_not_say_hangs_when_idle(server):
    assert server.pass_time(20, busy=[SERVER], statistics=False) is None
    assert server.pass_time(2, statistics=False).startswith("tritonserver hangs")


def test_shed_canaries_are_no_fault_while_others_are_answered(server):
    assert server.pass_time(300, moving=STEPS, verdict=Verdict.SHED) is None
    assert server.pulse.right == 0
    assert server.pass_time(4, moving=STEPS[:1], verdict=Verdict.SHED).startswith("hstu hangs")


def test_a_plan_is_watched_in_the_server(monkeypatch):
    stand_in = StandIn(monkeypatch)
    stand_in.processes = [p for p in stand_in.processes if p.name in (SERVER, "embedding_lookup")]
    stand_in.pulse = Pulse(stand_in, stand_in.processes, PATIENCE)
    assert stand_in.pass_time(10, moving=STEPS[:1], busy=[SERVER]) is None
    assert stand_in.pass_time(2, moving=STEPS[:1]).startswith("hstu hangs")


@pytest.mark.parametrize("verdict", [Verdict.WRONG, Verdict.FAILED, Verdict.GONE, Verdict.SILENT])
def test_two_bad_answers_are_a_fault_and_one_is_not(server, verdict):
    server.pass_time(0.1)
    server.answer(verdict, "why")
    assert server.pass_time(0.2) is None
    server.answer(Verdict.RIGHT)
    assert server.pass_time(0.6) is None
    server.answer(verdict, "why")
    assert server.pass_time(0.1) is None
    server.answer(verdict, "why")
    assert server.pass_time(0.1) == f"canary of ranking: {verdict.value} (why)"
    assert server.forgotten == (verdict is Verdict.WRONG)


def test_rows_out_of_reach_are_not_the_server_s_fault(server):
    assert server.pass_time(100, verdict=Verdict.OUT_OF_REACH) is None


def test_it_was_us_who_stood_still(server):
    server.pass_time(1)
    server.clock.now += 100
    server.pulse.start_over()
    for process in server.processes:
        process.active_at = server.clock.now
    assert server.pass_time(1) is None


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(100)"], stdout=-1)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_processes_that_stop_or_die(child):
    watched = Watched(child.pid, "hstu")
    assert watched.look() is None
    os.kill(child.pid, signal.SIGSTOP)
    assert eventually(watched.look) == "was stopped by a signal"
    os.kill(child.pid, signal.SIGCONT)
    eventually(lambda: watched.look() is None)
    child.kill()
    assert eventually(watched.look) == "died", "before anybody asked for its exit code"
    child.wait()
    assert watched.look() == "died"


def test_a_process_that_sleeps_is_idle_and_one_that_computes_is_not(child):
    eventually(lambda: _stat(child.pid)[0] == "S", "it sleeps")
    idle, busy = Watched(child.pid, "idle"), Watched(os.getpid(), "busy")
    began = time.monotonic()
    while time.monotonic() - began < 3:
        idle.look(), busy.look()
    assert busy.active_at - began > 2
    assert idle.active_at <= began + 1, "what it did before the first look counts for a window"


def test_any_name_of_any_process(tmp_path):
    """The kernel cuts names at 15 bytes, in the middle of a letter too: whoever reads them must not stumble."""
    program = tmp_path / "fourteen bytes\N{LATIN SMALL LETTER E WITH ACUTE}"
    program.symlink_to(shutil.which("sleep"))
    process = subprocess.Popen([program, "100"])
    try:
        eventually(lambda: Path(f"/proc/{process.pid}/comm").read_bytes() == b"fourteen bytes\xc3\n", "its name")
        assert Watched(process.pid, "odd").look() is None
        assert [found.pid for found in processes_of(process.pid)] == [process.pid]
        assert process.pid in family(os.getpid()) and process.pid in children_of(os.getpid())
        assert process.pid in held_by(os.getpid()).processes
    finally:
        process.kill()
        process.wait()
