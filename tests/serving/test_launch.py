"""What is refused before a server is launched: ports, addresses, programs, folders, damaged tables."""

import re
import socket

import pytest

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.serving import server, wheel_backend
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.guard import DOORS_VARIABLE, LIMITS_VARIABLE, guard_limits
from hstu_trt.serving.server import (
    LOOPBACK,
    Listen,
    Tritonserver,
    choose_port,
    find_tritonserver,
    plan_launch,
    plan_repository,
)
from hstu_trt.serving.starting import check

ADDRESSES = {"no such host": ("no.such.host.invalid", 0), "not ours": ("192.0.2.1", 0), "IPv6": ("::1", None)}
PORTS = {"too large": (LOOPBACK, 70000), "negative": (LOOPBACK, -1)}


@pytest.mark.parametrize(("address", "port"), (ADDRESSES | PORTS).values(), ids=ADDRESSES | PORTS)
def test_port_or_address_that_cannot_be_had(address, port):
    with pytest.raises(ConfigError, match=f"cannot listen on port {port or 0} of '{address}'"):
        choose_port(address, port)


def test_taken_port():
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on port {port} .*in use.* 0 for any free one"):
            choose_port(LOOPBACK, port)
        assert choose_port(LOOPBACK, 0) != port


@pytest.mark.parametrize("content", [None, "text"])
def test_tritonserver_must_be_a_program(tmp_path, content):
    if content:
        (tmp_path / "tritonserver").write_text(content)
    with pytest.raises(ArtefactError, match="tritonserver: no such program"):
        find_tritonserver(tmp_path / "tritonserver")


def test_run_folder_must_be_writable(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(ArtefactError, match=f"cannot write to {tmp_path / 'run'}"):
        plan_repository(Tritonserver(binary=tmp_path), tmp_path, tmp_path / "run", Listen(grpc_port=0), limits="")


@pytest.mark.parametrize("place", ["repository", "run"])
@pytest.mark.parametrize("name", ["a b", "a;b", "a$b", "a'b"])
def test_a_path_that_a_shell_reads_otherwise_is_refused(tmp_path, place, name):
    """Triton's Python backend hands the paths of its stubs to bash as they are."""
    folders = {"repository": tmp_path / "models", "run": tmp_path / "run"} | {place: tmp_path / name}
    server = Tritonserver(binary=tmp_path, wheel=tmp_path)
    with pytest.raises(ConfigError, match=re.escape(name) + ".* which Triton's Python backend hands to a shell"):
        plan_repository(server, folders["repository"], folders["run"], Listen(grpc_port=0), limits="")
    assert not (tmp_path / name).exists()


def test_damaged_tables_are_refused_before_the_launch(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "deployment", Options())
    check(deployment, hash_tables=True)
    shard = next(deployment.model.tables.glob("*/00000.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    check(deployment)
    with pytest.raises(ArtefactError, match=r"00000.safetensors does not match the sha256"):
        check(deployment, hash_tables=True)
    shard.write_bytes(whole[:-1])
    with pytest.raises(ArtefactError, match=r"00000.safetensors has \d+ bytes"):
        check(deployment)


def test_numpy_2_is_refused_beside_the_wheel(monkeypatch, tmp_path):
    """Its stub answers every request with tensors of no bytes there."""
    monkeypatch.setattr(wheel_backend.metadata, "version", lambda name: "2.5.5")
    with pytest.raises(ArtefactError, match=r"numpy 2\.5\.5.*'numpy<2'"):
        wheel_backend.prepare_backends(tmp_path, tmp_path / "backends", None)


def test_a_deployment_is_guarded_by_its_model_s_limits(make_model, tmp_path, monkeypatch):
    deployment = assemble(make_model(), tmp_path / "deployment", Options(queue=3))
    monkeypatch.setattr(server, "find_guard", lambda address, loopback: tmp_path)
    monkeypatch.setattr(server, "door_environment", lambda doors: {DOORS_VARIABLE: doors})
    for name in ("prepare_backends", "check_libraries"):
        monkeypatch.setattr(server, name, lambda *args: tmp_path)
    plan = plan_launch(Tritonserver(binary=tmp_path, wheel=tmp_path), deployment, Listen(grpc_port=0))
    assert plan.environment[LIMITS_VARIABLE] == guard_limits(deployment.model)
    assert plan.environment[DOORS_VARIABLE] == "ranking=embedding_lookup:3+3 ranking_fused=ranking_fused:3+3"
