"""A full disk under the log, the run folder and the published tables: nothing that is served notices."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from preloads import compiled
from served import request_of
from supervised import Supervised, process_of
from waiting import eventually

from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.refresh.settings import RefreshSettings

pytestmark = [pytest.mark.triton, pytest.mark.faults]
BOTH = ("ranking", "ranking_fused")


class Disk:
    """A folder whose disk can be full, for processes started after this."""

    def __init__(self, folder, flag):
        self.folder, self._flag = folder, flag

    def fill(self):
        self._flag.touch()

    def free(self):
        self._flag.unlink()


@pytest.fixture
def disk(tmp_path, monkeypatch):
    library = compiled("broken_disk", tmp_path)
    folder, flag = tmp_path / "disk", tmp_path / "full"
    folder.mkdir()
    for name, value in {"LD_PRELOAD": library, "FULL_DISK": folder, "FULL_DISK_FLAG": flag}.items():
        monkeypatch.setenv(name, str(value))
    return Disk(folder, flag)


def tables(*arguments):
    command = [sys.executable, "-m", "hstu_trt.tables", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def wait_for_version(url, request, name):
    for model in BOTH:
        with RankingClient(url, model) as client:
            eventually(lambda client=client: client.ask(request).tables_version.startswith(f"{name}@"), model)


def test_a_full_disk(deployment, disk):
    """Requests are answered, a dead process is replaced, publishing fails and says why; with space all goes on."""
    store, model = disk.folder / "store", deployment.model
    for version in ("v1", "v2"):
        shutil.copytree(model.tables, store / version)
    assert tables("publish", store / "v1").returncode == 0
    settings = RefreshSettings(tables=store, poll_s=0.1)
    served = assemble(model, disk.folder / "deployment", Options(refresh=settings))
    request = request_of(served, 8, 5)
    serve = Supervised(served)
    with RankingClient(serve.url) as client:
        before = client.ask(request)
        disk.fill()
        os.kill(process_of(serve.server, "hstu"), signal.SIGKILL)
        serve.wait_for("restarted")
        answer = client.ask(request)
        assert np.array_equal(answer.scores, before.scores)
        assert answer.tables_version == before.tables_version
        refused = tables("publish", store / "v2")
        assert refused.returncode == 2
        assert "No space left on device" in refused.stderr and "Traceback" not in refused.stderr
        assert (store / "CURRENT").read_text().strip() == "v1", "what is in use stays as it was"
        assert client.ask(request).tables_version == before.tables_version
        disk.free()
        assert tables("publish", store / "v2").returncode == 0
        wait_for_version(serve.url, request, "v2")
    assert [event["event"] for event in serve.events] == ["fault", "restarted"]
    assert serve.stop() == 0


def test_a_first_start_on_a_full_disk_says_so(deployment, disk):
    served = assemble(deployment.model, disk.folder / "deployment", Options())
    disk.fill()
    command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(served.path), "--grpc-port", "0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 2
    assert f"cannot write to {served.run} (No space left on device)" in answer.stderr
    assert "Traceback" not in answer.stderr
