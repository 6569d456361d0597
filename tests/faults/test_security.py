"""What a running server does not give away or let happen, and as whom and where it runs."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from served import Serve, in_process, request_of
from throwaway_ca import ThrowawayCa
from tritonclient.utils import InferenceServerException

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import write_manifest
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.plugin_files import AUTOLOAD_LIBRARY, PLUGIN_LIBRARY
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.deployment import ENGINES_LINK
from hstu_trt.serving.operating import exposure, in_run_folder
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch
from hstu_trt.serving.signature import MODELS
from hstu_trt.serving.supervision.processes import processes_of
from hstu_trt.serving.tls import ServerTls
from hstu_trt.serving.trusted_files import check_plugins

NOBODY = 65534
HEADER = "triton-grpc-protocol-admin-key"

# API -> a call of it that would succeed, or fail in another way, if it were open
CLOSED = {
    "model control: load": lambda client, headers: client.load_model("hstu", headers=headers),
    "model control: unload": lambda client, headers: client.unload_model("hstu", headers=headers),
    "model control: index": lambda client, headers: client.get_model_repository_index(headers=headers),
    "system shared memory": lambda client, headers: client.register_system_shared_memory("x", "/x", 8, headers=headers),
    "system shared memory: status": lambda client, headers: client.get_system_shared_memory_status(headers=headers),
    "CUDA shared memory": lambda client, headers: client.register_cuda_shared_memory("x", b"", 0, 8, headers=headers),
    "trace: settings": lambda client, headers: client.get_trace_settings(headers=headers),
    "trace: file": lambda client, headers: client.update_trace_settings(
        settings={"trace_level": "TIMESTAMPS", "trace_file": "/tmp/x"}, headers=headers
    ),
    "logging: settings": lambda client, headers: client.get_log_settings(headers=headers),
    "logging: file": lambda client, headers: client.update_log_settings({"log_file": "/tmp/x"}, headers=headers),
}


@pytest.fixture(scope="module")
def served(deployment):
    serve = Serve(deployment)
    yield serve
    assert serve.stop() == 0


def command_line(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")


@pytest.mark.triton
@pytest.mark.faults
@pytest.mark.parametrize("call", CLOSED.values(), ids=CLOSED)
def test_only_inference_is_open(served, call):
    """Nor with what the process list shows of the key."""
    (restricted,) = [word for word in command_line(served.facts["pid"]) if "admin-key" in word]
    shown = restricted.rpartition("=")[2]
    assert re.fullmatch("x+", shown), "the key is in the process list"
    client = grpc_client.InferenceServerClient(served.url)
    for headers in (None, {HEADER: shown}, {HEADER: ""}):
        with pytest.raises(InferenceServerException, match="This protocol is restricted, expecting header"):
            call(client, headers)
    client.close()


@pytest.mark.triton
@pytest.mark.faults
def test_the_key_would_open_them(deployment, tmp_path):
    """Else the test above would pass for another reason."""
    plan = plan_launch(find_tritonserver(), in_run_folder(deployment, tmp_path), Listen(grpc_port=0))
    from hstu_trt.serving.server_process import ServerProcess
    from hstu_trt.serving.starting import _wait_until_ready

    (restricted,) = [word for word in plan.command if "admin-key" in word]
    process = ServerProcess(plan)
    try:
        _wait_until_ready(process, MODELS, 60)
        client = grpc_client.InferenceServerClient(plan.url)
        assert client.get_log_settings(headers={HEADER: restricted.rpartition("=")[2]}).settings
        client.close()
    finally:
        process.drain()


class Recorder:
    """A node of a cluster that nobody can log in to: keeps what it is sent, and refuses it."""

    def __init__(self):
        self._heard = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._refuse, args=(connection,), daemon=True).start()

    def _refuse(self, connection):
        with connection:
            while data := connection.recv(4096):
                self._heard.append(data)  # from several threads: one operation
                connection.sendall(b"-WRONGPASS invalid username-password pair or user is disabled.\r\n" * 4)

    @property
    def heard(self):
        return b"".join(self._heard)

    def close(self):
        self._listener.close()


@pytest.fixture
def node():
    recorder = Recorder()
    yield recorder
    recorder.close()


@pytest.mark.triton
@pytest.mark.faults
@pytest.mark.redis
def test_no_secret_shows(deployment, node, tmp_path, monkeypatch):
    """Of passwords and keys, in no file that is written, no command line and no output; and both are in use."""
    monkeypatch.setenv("HSTU_TRT_REDIS_PASSWORD", "pass-0word-of-the-environment")
    (tmp_path / "password").write_text("pass-0word-of-a-file\n")
    remote = {"tier": "remote", "nodes": [node.name], "deadline_ms": 200}
    tables = {"item_id": remote, "item_category_id": {**remote, "password_file": str(tmp_path / "password")}}
    (tmp_path / "tables.json").write_text(json.dumps({"tables": tables}))
    remote = assemble(deployment.model, tmp_path / "deployment", Options(tiers=tmp_path / "tables.json"))
    cert, key = ThrowawayCa(tmp_path / "ca").issue("server", names=("127.0.0.1",))
    options = ["--tls-cert", str(cert), "--tls-key", str(key), "--run", str(tmp_path / "run")]
    secrets = [b"pass-0word", *(line for line in key.read_bytes().splitlines() if not line.startswith(b"-"))]
    shown = dry_run(remote, *options)
    serve = Serve(remote, *options)
    try:
        shown += [b" ".join(map(str.encode, command_line(process.pid))) for process in processes_of(serve.facts["pid"])]
    finally:
        serve.stop()
    shown += [serve.process.stdout.read().encode(), serve.process.stderr.read().encode()]
    written = [path for folder in ("run", "deployment") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert any(path.name.startswith("triton-") for path in written) and any("events" in path.name for path in written)
    shown += [path.read_bytes() for path in written]
    for secret in secrets:
        assert not [text[:200] for text in shown if secret in text], secret
    assert b"pass-0word-of-the-environment" in node.heard and b"pass-0word-of-a-file" in node.heard


def dry_run(deployment, *options):
    command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(deployment.path), "--dry-run"]
    outputs = [
        subprocess.run([*command, *options, *more], capture_output=True, check=True) for more in ([], ["--json"])
    ]
    return [stream for output in outputs for stream in (output.stdout, output.stderr)]


@pytest.fixture
def readable():
    """A folder that every user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="hstu_trt_"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


def ordinary_user():
    """How to start a command without any power of root: words before it, and arguments of subprocess.

    As ``nobody``; where that user cannot run this Python, in a user namespace whose user is none; else skips.
    """
    if os.geteuid() != 0:
        return [], {}
    nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    for before, more in (([], nobody), (["unshare", "--user", "--map-user=1000", "--map-group=1000"], {})):
        command = [*before, sys.executable, "-c", "import hstu_trt.serving.serve"]
        with contextlib.suppress(OSError):
            if subprocess.run(command, capture_output=True, check=False, **more).returncode == 0:
                return before, more
    pytest.skip(f"neither user {NOBODY} nor a user namespace can run {sys.executable}")


def capabilities(pid):
    return int(re.search(r"^CapEff:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)[1], 16)


@pytest.mark.triton
@pytest.mark.faults
def test_an_ordinary_user_serves_what_it_may_only_read(deployment, readable, monkeypatch):
    before, more = ordinary_user()
    model = read_model_folder(shutil.copytree(deployment.model.path, readable / "model"))
    locked = assemble(model, readable / "deployment", Options())
    run = readable / "run"
    run.mkdir()
    if "user" in more:
        shutil.chown(run, NOBODY, NOBODY)
    for path in (*readable.rglob("*"), readable):
        if path != run and not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    started = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **given: started([*before, *command], **given, **more))
    monkeypatch.setenv("HOME", str(run))
    command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(locked.path)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2 and "cannot write to" in refused.stderr and "--run" in refused.stderr
    there = sorted(path for path in readable.rglob("*") if run not in path.parents)
    serve = Serve(locked, "--run", str(run))
    try:
        processes = processes_of(serve.facts["pid"])
        assert len(processes) == 5 and {capabilities(process.pid) for process in processes} == {0}
        request = request_of(locked, 8, 5)
        for name in ("ranking", "ranking_fused"):
            with RankingClient(serve.url, name, timeout_s=20) as client:
                scores = client.rank(request.user, request.history, request.candidates)
            assert np.abs(scores - in_process(locked, name, request)).max() <= 1e-6
    finally:
        assert serve.stop() == 0
    assert sorted(path for path in readable.rglob("*") if run not in path.parents) == there
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o002 == 0 for path in run.rglob("*"))


@pytest.mark.triton
@pytest.mark.faults
def test_open_doors_without_a_lock_are_told(deployment, tmp_path):
    serve = Serve(deployment, "--address", "0.0.0.0", "--run", str(tmp_path))
    assert serve.stop() == 0
    assert serve.process.stderr.read().startswith("WARNING: gRPC on '0.0.0.0' without TLS")
    assert '"event": "warning"' in (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_is_no_open_door(address):
    assert exposure(Listen(address=address)) is None


@pytest.mark.parametrize("address", ["0.0.0.0", "", "10.0.0.1", "::", "localhost.example.com"])
def test_other_addresses_are_unless_there_is_tls(address):
    assert "docs/security.md" in exposure(Listen(address=address))
    tls = ServerTls(cert=Path("x"), key=Path("x"), server_name="x")
    assert exposure(Listen(address=address, tls=tls)) is None


@pytest.fixture
def plugins(tmp_path, deployment):
    """(a deployment with engines, its plugins' autoload library): files that only look like them."""
    library, engines = tmp_path / "lib", tmp_path / "deployment" / ENGINES_LINK
    library.mkdir(mode=0o755)
    engines.mkdir(parents=True)
    for name in (PLUGIN_LIBRARY, AUTOLOAD_LIBRARY):
        (library / name).write_bytes(name.encode())
    from hstu_trt.contract.manifest import file_sha256

    facts = {"plugins": {"file": PLUGIN_LIBRARY, "sha256": file_sha256(library / PLUGIN_LIBRARY)}}
    write_manifest(engines, kind="engines", made_by="test", files=[], facts=facts)
    return dataclasses.replace(deployment, path=tmp_path / "deployment"), library / AUTOLOAD_LIBRARY


def test_the_plugins_that_the_plans_were_built_with(plugins):
    check_plugins(*plugins)


SPOILT = {
    "another library": (lambda folder: (folder / PLUGIN_LIBRARY).write_bytes(b"other"), "is not the plugin library"),
    "no library": (lambda folder: (folder / PLUGIN_LIBRARY).unlink(), "there is none"),
    "open library": (lambda folder: (folder / PLUGIN_LIBRARY).chmod(0o666), "chmod o-w .*plugins.so"),
    "open autoload library": (lambda folder: (folder / AUTOLOAD_LIBRARY).chmod(0o666), "chmod o-w .*autoload.so"),
    "open folder": (lambda folder: folder.chmod(0o777), "chmod o-w .*lib"),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_other_plugins_are_refused(plugins, spoil, said):
    deployment, autoload = plugins
    spoil(autoload.parent)
    with pytest.raises(ArtefactError, match=said):
        check_plugins(deployment, autoload)
