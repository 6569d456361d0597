"""Keys, partitions and slots agree between Python, C++ and the Redis Cluster specification; odd input is refused."""

import subprocess
import sys

import numpy as np
import pytest

from hstu_trt.bench.tables import local_cluster
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.tables import remote_library as remote_library_module
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions, Credentials, RemoteRows, Tls
from hstu_trt.tables.remote_layout import RemoteVersion, default_partitions
from hstu_trt.tables.remote_library import remote_library
from hstu_trt.tables.remote_resp import RemoteError, decode

VERSION = RemoteVersion(
    table="item_id", version="v7", rows=100, dim=4, dtype="float16", features=("item",), partitions=256, digest="d"
)

# The first is the check value of CRC16/XMODEM; the rest follow from the specification's rule for braces.
SLOTS = [
    (b"123456789", 0x31C3 % 16384),
    (b"foo{bar}", 5061),
    (b"bar", 5061),
    (b"{bar}{zap}", 5061),
    (b"foo{bar}{zap}", 5061),
    (b"", 0),
]


@pytest.mark.redis
@pytest.mark.parametrize(("key", "slot"), SLOTS)
def test_slots_of_known_keys(key, slot):
    assert remote_library().slot(key, len(key)) == slot


@pytest.mark.redis
@pytest.mark.parametrize(("key", "whole"), [(b"foo{}bar", b"foo{}bar"), (b"foo{{bar}}zap", b"{bar"), (b"a{b", b"a{b")])
def test_slots_of_odd_braces(servers, key, whole):
    slot = remote_library().slot(key, len(key))
    assert slot == servers.nodes[0].command("CLUSTER", "KEYSLOT", key.decode())
    assert slot == remote_library().slot(whole, len(whole)) or whole == key


def splitmix64(state):
    mask = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


@pytest.mark.redis
def test_partitions_are_splitmix64():
    # The first output of the published generator from state 0.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    rows = RemoteRows(VERSION)
    for row in [0, 1, 2, 12345, 2**31, 10**9, 2**62, 2**63 - 1]:
        assert remote_library().partition(rows.handle, row) == splitmix64(row) % 256


@pytest.mark.parametrize(
    ("rows", "row_bytes", "partitions"),
    [
        (0, 4, 64), (100_000, 1024, 64), (64 << 20, 128, 64), ((64 << 20) + 1, 128, 128),
        (10**9, 516, 4096), (10**9, 1024, 8192), (10**11, 1024, 1 << 14),
    ],
)  # fmt: skip
def test_partitions_grow_with_the_table(rows, row_bytes, partitions):
    assert default_partitions(rows, row_bytes) == partitions


def test_a_description_survives():
    assert RemoteVersion.from_fields("item_id", "v7", VERSION.fields()) == VERSION
    assert VERSION.partition_key(3) == "e:{item_id:v7:3}"
    assert VERSION.value_bytes == 8


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "2"}, {"rows": "-1"}, {"rows": "many"}, {"dim": "0"}, {"dtype": "object"}, {"partitions": "3"},
        {"features": "{}"}, {"features": "["}, {"partitions": "0"},
    ],
)  # fmt: skip
def test_a_foreign_description_is_refused(change):
    with pytest.raises(RemoteError, match="no version 'v7' in the cluster that can be read"):
        RemoteVersion.from_fields("item_id", "v7", {**VERSION.fields(), **change})


@pytest.mark.parametrize("missing", VERSION.fields())
def test_a_description_that_lacks_a_field_is_refused(missing):
    fields = {name: text for name, text in VERSION.fields().items() if name != missing}
    with pytest.raises(RemoteError, match=missing):
        RemoteVersion.from_fields("item_id", "v7", fields)


@pytest.mark.parametrize("name", ["", "a b", "a{b", "a:b", "../x", "é"])
def test_names_that_would_break_a_key_are_refused(name):
    for field in ("table", "version"):
        with pytest.raises(ConfigError, match=field):
            RemoteVersion(**{**vars(VERSION), field: name})


@pytest.mark.redis
def test_rows_that_are_too_long_are_refused():
    with pytest.raises(ConfigError, match="1 byte to 1 MiB"):
        RemoteRows(RemoteVersion(**{**vars(VERSION), "dim": (1 << 19) + 1}))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        (b"+OK\r\n", "OK"), (b":12\r\n", 12), (b"$-1\r\n", None), (b"$0\r\n\r\n", b""), (b"*0\r\n", []),
        (b"$4\r\na\r\nb\r\n", b"a\r\nb"), (b"*2\r\n*1\r\n:1\r\n$1\r\nx\r\n", [[1], b"x"]),
    ],
)  # fmt: skip
def test_replies(reply, value):
    assert decode(reply) == value


@pytest.mark.parametrize("reply", [b"", b"OK\r\n", b"+OK", b"*1\r\n", b":1\r\n:2\r\n"])
def test_broken_replies_are_refused(reply):
    with pytest.raises(RemoteError):
        decode(reply)


@pytest.mark.parametrize("nodes", [(), ("host",), ("host:",), ("a:1,b:2",), ("host:1", "")])
def test_wrong_nodes_are_refused(nodes):
    with pytest.raises(ConfigError, match="host:port"):
        ClusterOptions(nodes=nodes)


def test_passwords_come_from_a_file_or_the_environment(tmp_path):
    (tmp_path / "secret").write_text("from file\nignored\n")
    environment = {"HSTU_TRT_REDIS_USER": "reader", "HSTU_TRT_REDIS_PASSWORD": "from environment"}
    assert Credentials.read(None, environment).password == "from environment"
    read = Credentials.read(tmp_path / "secret", environment)
    assert (read.user, read.password) == ("reader", "from file")
    assert "from" not in repr(read)
    assert "from" not in repr(ClusterOptions(nodes=("a:1",), credentials=read))
    assert Credentials.read(None, {}) == Credentials()


@pytest.mark.parametrize("text", ["", "\nlate"])
def test_a_password_file_without_a_password_is_refused(tmp_path, text):
    (tmp_path / "secret").write_text(text)
    with pytest.raises(ConfigError, match="first line"):
        Credentials.read(tmp_path / "secret", {})
    with pytest.raises(ConfigError, match="cannot be read"):
        Credentials.read(tmp_path / "absent", {})


def test_a_client_certificate_needs_its_key(tmp_path):
    with pytest.raises(ConfigError, match="come together"):
        Tls(certificate=tmp_path)


def test_rows_are_numbered_little_endian():
    assert np.asarray([258], np.int64).tobytes() == b"\x02\x01" + bytes(6)


def test_a_missing_library_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(remote_library_module, "LIBRARY", tmp_path / "libhstu_trt_remote.so")
    remote_library_module.remote_library.cache_clear()
    try:
        with pytest.raises(ArtefactError, match="make remote-lib"):
            Cluster(ClusterOptions(nodes=("127.0.0.1:1",)))
        (tmp_path / "libhstu_trt_remote.so").write_text("no library")
        with pytest.raises(ArtefactError, match="cannot be loaded"):
            Cluster(ClusterOptions(nodes=("127.0.0.1:1",)))
    finally:
        remote_library_module.remote_library.cache_clear()


def test_a_missing_server_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(local_cluster, "UNPACKED", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(local_cluster.SERVER_VARIABLE, raising=False)
    with pytest.raises(ArtefactError, match="make redis"):
        local_cluster.start_cluster(tmp_path / "cluster")


@pytest.mark.redis
@pytest.mark.parametrize("tls", [False, True])
def test_openssl_is_loaded_for_tls_alone(tls):
    code = f"""
from pathlib import Path
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions, Tls
from hstu_trt.tables.remote_resp import RemoteError
try:
    Cluster(ClusterOptions(nodes=("127.0.0.1:1",), tls=Tls() if {tls} else None))
except RemoteError:
    print("libssl" in Path("/proc/self/maps").read_text())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tls)
