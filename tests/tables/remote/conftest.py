"""One real cluster for the room's tests: three masters, three replicas, and a table of two dtypes in it."""

import os
import signal

import pytest
from remote_tables import SHAPES, push, wait_for_replicas, write_folder

from hstu_trt.bench.tables.local_cluster import SERVER_VARIABLE, start_cluster
from hstu_trt.tables.remote import RemoteTables
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_push import publish


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    started = start_cluster(tmp_path_factory.mktemp("redis"), masters=3, replicas=3)
    try:
        started.wait()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tables") / "v1")


@pytest.fixture(scope="session")
def pushed(servers, folder):
    """The servers with version v1 of both tables in use, on masters and replicas."""
    with Cluster(ClusterOptions(nodes=servers.names[:1])) as cluster:
        push(cluster, folder, "v1")
        for name in SHAPES:
            publish(cluster, name, "v1")
    wait_for_replicas(servers)
    return servers


@pytest.fixture
def open_tables(pushed):
    """``open_tables(deadline_ms=..., local=...)``; options of the cluster go as ``cluster={...}``."""
    opened = []

    def open_them(names=tuple(SHAPES), cluster=None, **options):
        nodes = tuple(node.name for node in pushed.nodes)
        client = Cluster(ClusterOptions(nodes=nodes, **(cluster or {})))
        opened.append(client)
        return RemoteTables(client, names, **{"deadline_ms": 1000.0, **options})

    yield open_them
    for client in opened:
        client.close()


@pytest.fixture
def unharmed(pushed):
    """For tests that harm nodes: afterwards every node runs, and the cluster is whole."""
    yield pushed
    for node in pushed.nodes:
        node.signal(signal.SIGCONT)
        if node.process.poll() is not None:
            node.start()
    pushed.wait()
    wait_for_replicas(pushed)


@pytest.fixture(autouse=True)
def no_login(monkeypatch):
    for name in list(os.environ):
        if name.startswith("HSTU_TRT_REDIS") and name != SERVER_VARIABLE:
            monkeypatch.delenv(name)
