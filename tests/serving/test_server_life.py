"""How a real server begins and ends: drained, killed, left behind, or never ready."""

import dataclasses
import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from served import Serve, request_of
from supervised import is_running
from waiting import PATIENCE_S, eventually

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.deployment import read_deployment
from hstu_trt.serving.requests import pack
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch
from hstu_trt.serving.starting import StartError, start

pytestmark = pytest.mark.triton


def test_sigterm_finishes_running_requests(deployment):
    serve = Serve(deployment)
    with RankingClient(serve.url) as client:
        users = [request_of(deployment, *lengths) for lengths in [(8, 5), (0, 3), (127, 2), (128, 40), (64, 64)]]
        packed = pack(client.config, users)
        futures = [client._send(packed) for _ in range(8)]
        first = client._receive(futures[0])
        code = serve.stop()
        answers = [client._receive(future) for future in futures[1:]]
    assert code == 0
    assert all(np.array_equal(answer, first) for answer in answers)


def test_death_of_the_server_is_told(deployment):
    serve = Serve(deployment, "--no-restart")
    os.kill(serve.facts["pid"], signal.SIGKILL)
    assert serve.process.wait(PATIENCE_S) == 1
    assert "tritonserver died with code -9" in serve.process.stderr.read()
    no_orphans_of(deployment)


def test_the_server_ends_when_serve_is_killed(deployment):
    serve = Serve(deployment)
    serve.stop(signal.SIGKILL)
    eventually(lambda: not is_running(serve.facts["pid"]), "the server lives on")
    no_orphans_of(deployment)


def no_orphans_of(deployment):
    """Those that were killed may take a moment to be gone."""
    eventually(lambda: not orphans_of(deployment), lambda: orphans_of(deployment))


def orphans_of(deployment):
    """Servers and stubs of a deployment whose parent is gone."""
    marker = str(deployment.repository).encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if parent == "1" and marker in (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


@pytest.fixture
def damaged(deployment, tmp_path):
    """A deployment whose hstu.onnx is cut short since it was assembled."""
    folder, model = tmp_path / "deployment", tmp_path / "deployment" / "model"
    model.mkdir(parents=True)
    shutil.copytree(deployment.repository, folder / "models")
    shutil.copy(deployment.path / "manifest.json", folder)
    for path in deployment.model.path.iterdir():
        (model / path.name).symlink_to(path)
    half = (model / "hstu.onnx").read_bytes()[:5000]
    (model / "hstu.onnx").unlink()
    (model / "hstu.onnx").write_bytes(half)
    return dataclasses.replace(deployment, path=folder)


def test_damaged_model_is_refused_before_the_launch(damaged):
    with pytest.raises(ArtefactError, match=r"hstu.onnx has 5000 bytes"):
        read_deployment(damaged.path)


def test_failed_start_shows_the_cause(damaged):
    """As if the file had been damaged after the check."""
    manifest = damaged.path / "model" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["files"]["hstu.onnx"]["bytes"] = 5000
    manifest.unlink()
    manifest.write_text(json.dumps(document))
    plan = plan_launch(find_tritonserver(), damaged, Listen(grpc_port=0))
    with pytest.raises(StartError) as caught:
        start(damaged, plan)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 8
    assert any("model 'hstu'" in line and "hstu.onnx" in line for line in lines), lines
    assert "full log: " in lines[-1]
