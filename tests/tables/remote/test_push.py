"""``hstu-trt tables push`` and ``cluster-*`` against a real cluster: whole, resumed, and refused."""

import json
import signal

import numpy as np
import pytest
from remote_tables import SHAPES, master_of, partition_key, table_values, write_folder

from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import GateError
from hstu_trt.tables import remote_push
from hstu_trt.tables.host import LookupOptions
from hstu_trt.tables.remote import RemoteTables
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_push import Push, retire
from hstu_trt.tables.remote_resp import RemoteError

pytestmark = pytest.mark.redis

ITEMS = SHAPES["items"][0]


@pytest.fixture
def client(pushed):
    with Cluster(ClusterOptions(nodes=pushed.names)) as cluster:
        yield cluster


@pytest.fixture
def small_blocks(monkeypatch):
    """1,000 rows of items."""
    monkeypatch.setattr(remote_push, "_BLOCK_BYTES", 64_000)


@pytest.fixture
def fresh(client, request):
    """A version that is gone after the test."""
    name = request.node.name.replace("[", "-").replace("]", "")
    yield name
    for key in (f"e:{{items:{name}}}", *(f"e:{{items:{name}:{p}}}" for p in range(16))):
        client.execute("DEL", key)
    client.execute("HDEL", "e:{items}", f"version:{name}")


def tables(pushed, verb, *arguments):
    return main(["tables", verb, "--cluster", ",".join(pushed.names), *map(str, arguments)])


def stored(client, version):
    found = RemoteTables(client, ["items"], versions={"items": version}, deadline_ms=2000)
    return found.lookup("items", np.arange(ITEMS), LookupOptions(dtype="float16"))[0]


def test_the_command_pushes_publishes_and_retires(pushed, client, folder, fresh, capsys):
    versioned = ["--table", "items", "--version", fresh]
    assert tables(pushed, "push", folder, *versioned, "--partitions", 16, "--publish") == 0
    assert "10007 rows, 625.4 KiB, 10007 written now, every row read back; in use" in capsys.readouterr().out
    np.testing.assert_array_equal(stored(client, fresh), table_values("items"))
    assert tables(pushed, "cluster-status", "--table", "items") == 0
    out = capsys.readouterr().out
    assert f"version {fresh}: 10007 rows, complete, in use" in out
    assert out.count(" master ") == out.count(" replica ") == 3
    assert "warning" not in out
    assert tables(pushed, "cluster-retire", *versioned) == 1
    assert "is in use" in capsys.readouterr().err
    assert tables(pushed, "cluster-publish", "--table", "items", "--version", "v1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"current": "v1", "before": fresh}
    assert tables(pushed, "cluster-retire", *versioned, "--after", 100) == 0
    assert "(17 keys) expires in 100 s" in capsys.readouterr().out
    assert 0 < client.execute("TTL", f"e:{{items:{fresh}:3}}") <= 100


def test_an_interrupted_push_goes_on(client, folder, fresh, small_blocks):
    class InterruptError(Exception):
        pass

    done = []

    def interrupt(what, size):
        done.append(what)
        if len(done) == 4:
            raise InterruptError

    with pytest.raises(InterruptError):
        Push(client, folder, "items", fresh, 16).run(interrupt)
    with pytest.raises(RemoteError, match="not complete"):
        stored(client, fresh)
    result = Push(client, folder, "items", fresh, 16).run()
    assert (result.rows_written, result.rows_verified) == (ITEMS - 4000, ITEMS)
    np.testing.assert_array_equal(stored(client, fresh), table_values("items"))
    assert Push(client, folder, "items", fresh, 16).run().rows_written == 0


def test_a_retired_version_is_found_no_more_and_comes_back_with_a_push(client, folder, fresh):
    Push(client, folder, "items", fresh, 16).run()
    keys = [f"e:{{items:{fresh}}}", *(f"e:{{items:{fresh}:{p}}}" for p in range(16))]
    assert retire(client, "items", fresh, 100) == len(keys)
    with pytest.raises(RemoteError, match="not complete"):
        stored(client, fresh)
    assert all(0 < client.execute("TTL", key) <= 101 for key in keys)
    client.execute("DEL", keys[3])
    assert Push(client, folder, "items", fresh, 16).run().rows_written == ITEMS
    assert {client.execute("TTL", key) for key in keys} == {-1}
    np.testing.assert_array_equal(stored(client, fresh), table_values("items"))


@pytest.mark.parametrize("value", [b"x" * 64, b"short", None])
def test_a_row_that_changed_is_found_and_written_again(client, folder, fresh, small_blocks, value):
    push = Push(client, folder, "items", fresh, 16)
    push.run()
    key, field = partition_key(push.version, 7_003), (7_003).to_bytes(8, "little")
    client.execute("HSET", key, field, value) if value else client.execute("HDEL", key, field)
    with pytest.raises(GateError, match=r"row 7003 and 0 more of this block differ"):
        push.run()
    assert Push(client, folder, "items", fresh, 16).run().rows_written == ITEMS - 7_003
    np.testing.assert_array_equal(stored(client, fresh), table_values("items"))


def test_a_version_never_changes(client, folder, tmp_path):
    other = write_folder(tmp_path / "other", seed=9)
    with pytest.raises(RemoteError, match=r"another version 'v1' of table 'items' \(it differs in digest\)"):
        Push(client, other, "items", "v1", 64).run()
    with pytest.raises(RemoteError, match="differs in partitions"):
        Push(client, folder, "items", "v1", 32).run()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "others", "--version", "v1"], "has no table 'others'"),
        (["--table", "items", "--version", "a:b"], "version 'a:b'"),
        (["--table", "items", "--version", "v1", "--partitions", "3"], "power of two"),
        (["--table", "items", "--version", "v1", "--password-file", "absent"], "password file absent"),
        (["--table", "items", "--version", "v1", "--tls-key", "k"], "come together"),
    ],
)
def test_wrong_arguments(pushed, folder, capsys, arguments, message):
    assert tables(pushed, "push", folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_folder_is_not_pushed(pushed, tmp_path, capsys):
    damaged = write_folder(tmp_path / "damaged")
    shard = damaged / "items/00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert tables(pushed, "push", damaged, "--table", "items", "--version", "v3") == 2
    assert "items/00001.safetensors does not match the sha256" in capsys.readouterr().err


def test_status_tells_what_is_wrong(unharmed, capsys):
    master = master_of(unharmed, "e:{items:v1:0}")
    other = next(node for node in unharmed.nodes if node is not master)
    other.command("CONFIG", "SET", "cluster-require-full-coverage", "yes", "maxmemory-policy", "allkeys-lru")
    master.signal(signal.SIGSTOP)
    try:
        code = main(["tables", "cluster-status", "--cluster", other.name, "--json"])
    finally:
        other.command("CONFIG", "SET", "cluster-require-full-coverage", "no", "maxmemory-policy", "noeviction")
    state = json.loads(capsys.readouterr().out)
    told = "\n".join(state["warnings"])
    assert f"{master.name} does not answer" in told
    assert f"{other.name}: cluster-require-full-coverage is yes" in told
    assert f"{other.name}: maxmemory-policy is allkeys-lru" in told
    assert code == (0 if state["slots_served"] == 16384 else 1)
    assert "slots are not served" in told or code == 0


def test_status_of_nobody(capsys):
    assert main(["tables", "cluster-status", "--cluster", "127.0.0.1:1"]) == 1
    assert "Connection refused" in capsys.readouterr().err
