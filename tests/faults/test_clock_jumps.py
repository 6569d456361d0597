"""The wall clock under a running deployment jumps by hours, and no client notices.

Every process of it, ``serve``, tritonserver and the models, runs on a clock that the test sets; the monotonic clock
goes on as it does when an operator, or a time server, sets the time of a machine.
"""

import os
import re
import shutil
import signal
import struct
import time
from datetime import datetime
from pathlib import Path

import pytest
from hammering import BOTH, Hammer
from preloads import compiled
from scraping import series
from served import events_of, in_process, request_of
from supervised import Supervised, process_of
from waiting import eventually

from hstu_trt.contract.table_versions import publish_version
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.server import choose_port
from hstu_trt.serving.supervision.processes import processes_of

pytestmark = [pytest.mark.triton, pytest.mark.faults]
HOUR = 3600.0
OFTEN = 300
NEAR_S = 60.0
"""What shows the clock of this moment, and is told or scraped a little later on a busy machine."""
PROMPT_S = 60.0
"""Well below an hour, and above what a refresh, a restart or a drain takes on a busy machine."""
LOG_LINE = re.compile(r"^[IWE](\d{4} \d{2}:\d{2}:\d{2}\.\d{6})", re.MULTILINE)


class Clock:
    """The wall clock of processes that are started after this."""

    def __init__(self, file):
        self._file, self.seconds = file, 0.0
        self._file.write_bytes(struct.pack("=q", 0))

    def put(self, seconds):
        """So far before the machine's, from now on."""
        self.seconds = seconds
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", int(seconds * 10**9)))

    @property
    def now(self):
        return time.time() + self.seconds


@pytest.fixture
def clock(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", str(compiled("jumping_clock", tmp_path)))
    monkeypatch.setenv("JUMPING_CLOCK", str(tmp_path / "clock"))
    return Clock(tmp_path / "clock")


@pytest.fixture
def jumped(clock, deployment, tmp_path):
    running = Jumped(deployment.model, tmp_path)
    yield running
    running.serve.stop()


class Jumped:
    """A deployment that follows published tables, served under a clock, and what it tells of itself."""

    def __init__(self, model, folder):
        self._model, self._store = model, folder / "store"
        self.publish("v1")
        settings = RefreshSettings(tables=self._store, poll_s=0.1)
        self.deployment = assemble(model, folder / "deployment", Options(refresh=settings))
        self._port, self.began = choose_port("127.0.0.1", 0), time.monotonic()
        self.serve = Supervised(self.deployment, "--metrics-port", str(self._port))

    def publish(self, name):
        shutil.copytree(self._model.tables, self._store / name)
        publish_version(self._store / name, regenerate="")

    def refresh(self, name, request):
        """Publishes the same rows once more, and returns after how many seconds both models serve them."""
        self.publish(name)
        began = time.monotonic()
        for model in BOTH:
            with RankingClient(self.serve.url, model) as client:
                while not client.ask(request).tables_version.startswith(f"{name}@"):
                    assert time.monotonic() - began < PROMPT_S, f"{model} does not take {name}"
                    time.sleep(0.02)
        return time.monotonic() - began

    def metrics(self):
        """Series -> value."""
        return series(self._port)

    def since(self):
        """The times since when the models say that they serve what they do."""
        return [value for name, value in self.metrics().items() if name.startswith("hstu_trt_tables_since_seconds")]

    def processes(self):
        return processes_of(self.serve.server)

    def last_logged(self):
        """Unix time of the last line of Triton's log, whose dates lack the year and are UTC."""
        year = datetime.now().year
        *_, last = LOG_LINE.findall(Path(self.serve.facts["log"]).read_text())
        return datetime.strptime(f"{year}{last}+0000", "%Y%m%d %H:%M:%S.%f%z").timestamp()


def durations_are_elapsed_time(metrics, elapsed_s):
    """No time that a request, a batch or a refresh took holds a jump, and no count went backwards."""
    micro = {name: value for name, value in metrics.items() if name.startswith("nv_inference") and "_us" in name}
    ours = {name: value for name, value in metrics.items() if re.match(r"hstu_trt_\w*seconds(_total)?\{", name)}
    ours = {name: value for name, value in ours.items() if "since" not in name}
    assert micro and ours
    most = {name: value for name, value in {**{n: v / 1e6 for n, v in micro.items()}, **ours}.items()}
    # Clients, canaries and batches wait beside each other, so times add up; an hour is beyond them all.
    assert all(0 <= value <= 10 * elapsed_s < HOUR for value in most.values()), most


def test_the_wall_clock_jumps_while_requests_flow(deployment, clock, jumped):
    requests = [request_of(deployment, *lengths, seed) for seed, lengths in enumerate([(8, 5), (64, 40), (0, 3)])]
    cases = {model: [(request, in_process(deployment, model, request)) for request in requests] for model in BOTH}
    serve = jumped.serve
    with Hammer(serve.url, cases) as clients:
        clients.wait_for_answers(time.monotonic())
        pids = {process.pid for process in jumped.processes()}
        assert all("jumping_clock.so" in Path(f"/proc/{pid}/maps").read_text() for pid in pids)
        for turn in range(OFTEN):  # at many moments of what waits for a time of the day
            clock.put((HOUR, 0.0, -HOUR, HOUR, -HOUR, 0.0)[turn % 6])
            clients.wait_for_answers(time.monotonic(), count=1)
        for name, at in (("v2", HOUR), ("v3", -HOUR)):
            clock.put(at)
            took = jumped.refresh(name, requests[0])
            print(f"{at:+.0f} s: refreshed in {took:.2f} s")
            # Shown a little after the first answer.
            eventually(lambda: all(abs(value - clock.now) < NEAR_S for value in jumped.since()), jumped.since)
            durations_are_elapsed_time(jumped.metrics(), time.monotonic() - jumped.began)
    outcome = clients.outcome
    print(f"{OFTEN + 2} jumps, {sum(map(len, outcome.right.values()))} right answers")
    assert outcome.failed == [] and outcome.wrong == [] and serve.events == []
    assert {process.pid for process in jumped.processes()} == pids
    after_an_hour_that_was_not(jumped, clock, cases)


def after_an_hour_that_was_not(jumped, clock, cases):
    """On a clock that stands an hour behind: what dies is replaced, logs show that clock, and the end is prompt."""
    serve = jumped.serve
    os.kill(process_of(serve.server, "hstu"), signal.SIGKILL)
    event = serve.wait_for("restarted")
    assert 0 < event["seconds"] < PROMPT_S
    (request, expected), *_ = cases["ranking"]
    with RankingClient(serve.url) as client:
        assert abs(client.ask(request).scores - expected).max() <= 1e-6
    told = datetime.fromisoformat(events_of(jumped.deployment.run)[-1]["time"].replace("Z", "+00:00")).timestamp()
    assert all(abs(moment - clock.now) < NEAR_S for moment in (told, jumped.last_logged()))
    began = time.monotonic()
    assert serve.stop() == 0
    assert time.monotonic() - began < PROMPT_S
