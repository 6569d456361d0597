"""Tables for the tests of the remote tier, and a look behind the cluster that holds them."""

import time

import numpy as np

from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.tables.remote_cluster import RemoteRows
from hstu_trt.tables.remote_library import remote_library
from hstu_trt.tables.remote_push import Push

SHAPES = {"items": (10_007, 32, "float16"), "users": (311, 24, "float32")}
FEATURES = {"items": ("item", "candidate"), "users": ("user",)}
PARTITIONS = {"items": 64, "users": 8}


def table_values(name, seed=0):
    rows, dim, dtype = SHAPES[name]
    return np.random.default_rng([seed, rows]).normal(size=(rows, dim)).astype(dtype)


def write_folder(folder, seed=0):
    stored = []
    for name, (rows, dim, dtype) in SHAPES.items():
        config = TableConfig(name=name, rows=rows, dim=dim, dtype=dtype, features=FEATURES[name])
        stored.append(write_table(folder, config, [table_values(name, seed)], shard_bytes=rows * dim))
    write_tables_manifest(folder, stored, "test", {})
    return folder


def push(cluster, folder, version):
    for name in SHAPES:
        Push(cluster, folder, name, version, PARTITIONS[name]).run()


def partition_key(version, row):
    """The key that holds a row."""
    rows = RemoteRows(version)
    return version.partition_key(remote_library().partition(rows.handle, row))


def wait_for_replicas(servers):
    def offset(node, field):
        lines = node.command("INFO", "replication").decode().splitlines()
        return next((line.split(":")[1] for line in lines if line.startswith(field)), None)

    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        masters = {offset(node, "master_replid:"): offset(node, "master_repl_offset:") for node in servers.nodes}
        if all(masters[offset(n, "master_replid:")] == offset(n, "master_repl_offset:") for n in servers.nodes):
            return
        time.sleep(0.02)
    raise AssertionError("the replicas do not catch up")


def master_of(servers, key):
    """The node that serves a key."""
    slot = int(servers.nodes[0].command("CLUSTER", "KEYSLOT", key))
    for first, last, master, *_ in servers.nodes[0].command("CLUSTER", "SLOTS"):
        if first <= slot <= last:
            return next(node for node in servers.nodes if node.port == master[1])
    raise AssertionError(f"nobody serves {key}")
