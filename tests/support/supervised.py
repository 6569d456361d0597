"""``hstu-trt serve`` that restarts what is broken, and its processes."""

import json
import re
import signal
import threading
from contextlib import suppress
from pathlib import Path

from scraping import counted
from served import Serve
from waiting import PATIENCE_S, eventually

from hstu_trt.serving.supervision.processes import processes_of
from hstu_trt.serving.supervision.supervisor import STABLE_CANARIES

PROMISED_S = 5.0


class Supervised(Serve):
    """``hstu-trt serve`` whose events are read as they come."""

    def __init__(self, deployment, *options):
        super().__init__(deployment, *options)
        self.events = []
        # A test that fails leaves it waiting for the server's end: it must not hold up ours.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.events.append(json.loads(line))

    @property
    def allowed_s(self):
        """From a fault to right answers. The promise is of a machine that is not loaded by others: where a start took
        longer than it does there, two cores that run other tests beside say, a restart does, too."""
        return 3 * PROMISED_S + 2 * self.facts["seconds"]

    @property
    def server(self):
        """The process of the server that runs now."""
        return [self.facts["pid"], *(event["pid"] for event in list(self.events) if event["pid"])][-1]

    def count(self, event):
        """How many events of a kind there were."""
        return [known["event"] for known in list(self.events)].count(event)

    def wait_for(self, event, count=1):
        """The last of so many events of a kind."""
        eventually(lambda: self.count(event) >= count, lambda: f"{count} x {event} in {self.events}")
        return [known for known in list(self.events) if known["event"] == event][count - 1]

    def wait_until_stable(self):
        """Returns when its server counts as one that stays up: else the next restart is put off, as in a loop of
        crashes. Nobody else may ask meanwhile, since canaries are told from other requests by nothing."""
        before = counted(self.url)

        def is_stable():
            # The last one may have been counted by the server, and not yet by serve.
            return all(now - before[model][0] > STABLE_CANARIES for model, (now, _) in counted(self.url).items())

        eventually(is_stable, "its server answers no canaries")

    def stop(self, number=signal.SIGTERM):
        code = super().stop(number)
        self._reader.join(PATIENCE_S)
        assert not self._reader.is_alive(), "somebody holds its output open"
        return code


def is_running(pid):
    """Not so for a process that ended and that nobody has asked for its exit code."""
    with suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    return False


def process_of(server, name):
    (found,) = [process.pid for process in processes_of(server) if process.name == name]
    return found


def regions_of(server):
    """Shared memory of a running server and its models, four regions of the Python backend at least: a pattern."""
    command = Path(f"/proc/{server}/cmdline").read_text().split("\0")
    (prefix,) = [found[1] for found in map(re.compile(r".*,shm-region-prefix-name=(.*)").fullmatch, command) if found]
    return f"{prefix}*"


def regions(pattern):
    """Those that are there."""
    return sorted(region.name for region in Path("/dev/shm").glob(pattern))
