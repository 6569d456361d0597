"""``hstu-trt serve`` that restarts what is broken, and its processes."""

import json
import re
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

from served import Serve

from hstu_trt.serving.supervision.processes import processes_of
from hstu_trt.serving.supervision.supervisor import STABLE_CANARIES

PROMISED_S = 5.0
# The promise is of a machine that is not loaded by others; two cores that run other tests beside may take longer.
ALLOWED_S = 3 * PROMISED_S
STABLE_S = 0.5 * (STABLE_CANARIES + 2)


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
    def server(self):
        """The process of the server that runs now."""
        return [self.facts["pid"], *(event["pid"] for event in list(self.events) if event["pid"])][-1]

    def count(self, event):
        """How many events of a kind there were."""
        return [known["event"] for known in list(self.events)].count(event)

    def wait_for(self, event, count=1, timeout_s=60.0):
        """The last of so many events of a kind."""
        deadline = time.monotonic() + timeout_s
        while len(found := [known for known in list(self.events) if known["event"] == event]) < count:
            assert time.monotonic() < deadline, self.events
            time.sleep(0.01)
        return found[count - 1]

    def stop(self, number=signal.SIGTERM):
        code = super().stop(number)
        self._reader.join()
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
