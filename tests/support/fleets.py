"""A real ``hstu-trt fleet`` as a child process, and load on it that knows every right answer."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from served import in_process, request_of

from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.fleet.control import ask
from hstu_trt.serving.fleet.gateway import children_of

MODELS = ("ranking", "ranking_fused")
ATOL = 2e-5


class FleetUnderTest:
    """``hstu-trt fleet``, ready when constructed; its commands through the real command line."""

    def __init__(self, deployment, run, replicas, port, first_replica_port, *options):
        self.run, self.url = run, f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "hstu_trt.serving.fleet.command", "--deployment", str(deployment.path)]
        command += ["--port", str(port), "--run", str(run), "--first-replica-port", str(first_replica_port), *options]
        command += [] if replicas is None else ["--replicas", str(replicas)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("ready"):
                break
        else:
            raise AssertionError("".join(self.lines))
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True).start()

    def command(self, *words):
        """``hstu-trt fleet WORDS`` or ``hstu-trt release WORDS``: exit code, stdout, stderr."""
        verb, *rest = words
        module = "command" if verb == "fleet" else "release_command"
        folder = "--run" if verb == "fleet" else "--fleet"
        command = [sys.executable, "-m", f"hstu_trt.serving.fleet.{module}", *map(str, rest), folder, str(self.run)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def status(self):
        code, out, err = self.command("fleet", "status", "--json")
        assert code == 0, err
        return json.loads(out)

    def replicas(self):
        return self.status()["current"]["replicas"]

    def wait_for(self, condition, what, timeout_s=180):
        """Polls the status until ``condition(status)``; returns the seconds that it took.

        Past the command line, whose start may take longer than what is waited for lasts.
        """
        began = time.monotonic()
        while not condition(status := ask(self.run, {"do": "status"}, print)):
            assert time.monotonic() - began < timeout_s, (what, status, self.lines[-20:])
            time.sleep(0.05)
        return time.monotonic() - began

    def all_serve(self, count):
        """Waits until that many replicas get requests, all of them well."""

        def well(status):
            replicas = status["current"]["replicas"]
            states = {replica["state"] for replica in replicas}
            return len(replicas) == len(status["gets_requests"]) == count and states == {"serving"}

        return self.wait_for(well, f"{count} replicas")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(180)


@dataclass
class Sent:
    """One request and what came back: the label of the deployment whose scores these are, else what went wrong."""

    user: int
    began: float
    ended: float
    answer: str
    tries: int


@dataclass
class Load:
    """Clients that send requests to the models, in turn, without a pause, inside ``with``.

    expected: label -> deployment; an answer must be the scores of one of them.
    """

    url: str
    expected: dict
    clients: int = 4
    models: tuple = MODELS
    sent: list = field(default_factory=list)

    def __post_init__(self):
        first = next(iter(self.expected.values()))
        self._requests = [request_of(first, 3 + 5 * seed, 2 + 3 * seed, seed=seed) for seed in range(4)]
        self._scores = {
            (label, model, seed): in_process(deployment, model, request)
            for label, deployment in self.expected.items()
            for model in self.models
            for seed, request in enumerate(self._requests)
        }
        self._stop = threading.Event()

    def __enter__(self):
        self._stop.clear()
        self._threads = [threading.Thread(target=self._send, args=(index,)) for index in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for_more(self, count=20):
        """Waits until the clients have had some more answers."""
        target = len(self.sent) + count
        while len(self.sent) < target:
            assert all(thread.is_alive() for thread in self._threads)
            time.sleep(0.02)

    @property
    def answers(self):
        return Counter(each.answer for each in self.sent)

    @property
    def failed_over(self):
        """Requests that the client sent more than once."""
        return sum(each.tries > 1 for each in self.sent)

    def _send(self, index):
        model, turn = self.models[index % len(self.models)], index
        with RankingClient(self.url, model) as client:
            tries = counted_tries(client)
            while not self._stop.is_set():
                turn += 1
                tries.clear()
                seed, began = turn % len(self._requests), time.monotonic()
                user = 1000 * index + turn % 50
                try:
                    request = self._requests[seed]
                    scores = client.rank(request.user, request.history, request.candidates, user_id=user)
                    answer = self._label(model, seed, scores)
                except Exception as error:
                    answer = f"{type(error).__name__}: {error}"
                self.sent.append(Sent(user, began, time.monotonic(), answer, len(tries)))

    def _label(self, model, seed, scores):
        near = [
            label
            for label in self.expected
            if np.abs(self._scores[label, model, seed] - scores).max() <= ATOL
        ]  # fmt: skip
        return near[0] if len(near) == 1 else f"wrong: near {near}"


def answers_in_order(load):
    """Labels of the answers, in the order in which the requests were sent."""
    labels = [each.answer for each in sorted(load.sent, key=lambda each: each.began)]
    load.sent.clear()
    return labels


def counted_tries(client):
    """A list that grows by one whenever the client sends a request."""
    infer, tries = client._client.async_infer, []

    def counted(*args, **options):
        tries.append(1)
        return infer(*args, **options)

    client._client.async_infer = counted
    return tries


@contextlib.contextmanager
def running_fleet(deployment, run, replicas, port, first_replica_port, *options):
    """replicas: None leaves it to the options."""
    fleet = FleetUnderTest(deployment, run, replicas, port, first_replica_port, *options)
    try:
        yield fleet
    finally:
        code = fleet.stop()
        assert code == 0, (code, fleet.lines[-20:])


def children(parent):
    """The tritonserver of a ``serve``, whose other child only waits to clean up after it."""
    return {pid for pid in children_of(parent) if _name_of(pid) == "tritonserver"}


def _name_of(pid):
    with contextlib.suppress(OSError):  # it has ended meanwhile
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    return None
