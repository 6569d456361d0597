"""A Redis Cluster on loopback, for tests and benchmarks: real servers, in a folder of their own, gone at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.tables.remote_resp import RemoteError, Reply, decode

UNPACKED = Path(__file__).resolve().parents[2] / "build/redis"
SERVER_VARIABLE = "HSTU_TRT_REDIS_SERVER"
"""Environment variable with the path of another server, Valkey's say."""
SLOTS = 16384
NODE_TIMEOUT_MS = 1500
_START_S = 60.0


def find_server() -> Path | None:
    """What HSTU_TRT_REDIS_SERVER names, what `make redis` unpacked, else Redis or Valkey, 7 or later, on PATH."""
    named, unpacked = os.environ.get(SERVER_VARIABLE), UNPACKED / "usr/bin/redis-server"
    if named:
        return Path(named).absolute()
    found = unpacked if unpacked.exists() else shutil.which("redis-server") or shutil.which("valkey-server")
    return Path(found) if found else None


def server_environment(server: Path) -> dict[str, str]:
    """Libraries that were unpacked with a server stand where the loader does not look."""
    environment, root = dict(os.environ), server.parents[min(2, len(server.parents) - 1)]
    libraries = [str(folder) for folder in (root / "usr/lib").glob("*-linux-gnu")]
    if root != Path(root.anchor) and libraries:
        environment["LD_LIBRARY_PATH"] = ":".join(libraries)
    return environment


@dataclass
class LocalNode:
    """One server."""

    server: Path
    folder: Path
    port: int
    settings: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts the server; a node that was there before comes back with its place in the cluster."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), "daemonize": "no",
            "cluster-enabled": "yes", "cluster-node-timeout": str(NODE_TIMEOUT_MS), "save": '""',
            "appendonly": "no", "cluster-require-full-coverage": "no", "repl-diskless-sync-delay": "0",
            # CLUSTER SLOTS leaves out a replica until it has heard something from its master.
            "repl-ping-replica-period": "1",
            "unixsocket": str(self.folder / "s"), "logfile": str(self.folder / "log"), **self.settings,
        }  # fmt: skip
        if self.password is not None:
            settings |= {name: f'"{self.password}"' for name in ("requirepass", "masterauth")}
        config = self.folder / "redis.conf"
        config.touch(mode=0o600)
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        self.process = subprocess.Popen(
            [str(self.server), str(config)],
            env=server_environment(self.server), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def command(self, *parts: str) -> Reply:
        """One command over the server's own Unix socket: past TLS, and past what the network is made to do."""
        words = [*(["AUTH", self.password] if self.password else []), *parts]
        with socket.socket(socket.AF_UNIX) as stream:
            stream.settimeout(5)
            stream.connect(str(self.folder / "s"))
            if self.password:
                _ask(stream, words[:2])
            return decode(_ask(stream, list(parts)))

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to this server."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


def _ask(stream: socket.socket, parts: list[str]) -> bytes:
    stream.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p.encode()), p.encode()) for p in parts))
    reply = b""
    while True:
        reply += stream.recv(1 << 16) or b"-the server closed the connection\r\n"
        with contextlib.suppress(RemoteError, IndexError, ValueError):
            decode(reply)
            return reply
        if reply[:1] == b"-" and reply.endswith(b"\r\n"):
            return reply


@dataclass
class LocalCluster:
    """Masters, then replicas: the i-th replica copies the i-th master."""

    nodes: list[LocalNode]
    masters: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    def wait(self, up_s: float = _START_S) -> None:
        """Waits until every node sees every slot served and every replica follows its master. Raises RemoteError."""
        limit = time.monotonic() + up_s
        while not all(self._is_ready(node) for node in self.nodes):
            if time.monotonic() > limit:
                raise RemoteError(f"the local cluster is not ready after {up_s:.0f} s; logs in {self.nodes[0].folder}")
            time.sleep(0.05)

    def _is_ready(self, node: LocalNode) -> bool:
        try:
            info = str(_text(node.command("CLUSTER", "INFO")))
            replication = str(_text(node.command("INFO", "replication")))
        except (OSError, RemoteError):
            return False
        ready = "cluster_state:ok" in info and f"cluster_slots_ok:{SLOTS}" in info
        linked = "role:master" in replication or "master_link_status:up" in replication
        return ready and linked and self._servers_seen_by(node) == len(self.nodes)

    def _servers_seen_by(self, node: LocalNode) -> int:
        """Masters and replicas in a node's map of slots; news of replicas travel slowly."""
        ranges = node.command("CLUSTER", "SLOTS")
        entries = [entry for entry in ranges if isinstance(entry, list)] if isinstance(ranges, list) else []
        return len({server[1] for entry in entries for server in entry[2:] if isinstance(server, list)})

    def role(self, node: LocalNode) -> str:
        """``master`` or ``slave``."""
        return "master" if "role:master" in _text(node.command("INFO", "replication")) else "slave"

    def stop(self) -> None:
        """Ends all servers."""
        for node in self.nodes:
            node.kill()


def _text(reply: Reply) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)


def start_cluster(
    folder: Path, masters: int = 3, replicas: int = 0, *, password: str | None = None, **settings: str
) -> LocalCluster:
    """Starts servers and joins them; ``wait`` tells when they serve. Raises ArtefactError without a redis-server."""
    server = find_server()
    if server is None:
        raise ArtefactError("there is no redis-server: unpack Debian's with `make redis`, or put one on PATH")
    settings = {name.replace("_", "-"): value for name, value in settings.items()}
    ports = free_ports(2 * (masters + replicas))
    nodes = [
        LocalNode(server, folder / str(number), port, {"cluster-port": str(ports.pop()), **settings}, password=password)
        for number, port in enumerate(ports[: masters + replicas])
    ]
    cluster = LocalCluster(nodes, masters)
    try:
        _join(cluster)
    except BaseException:
        cluster.stop()
        raise
    return cluster


def _join(cluster: LocalCluster) -> None:
    nodes, masters = cluster.nodes, cluster.masters
    for node in nodes:
        node.start()
    for number, node in enumerate(nodes):
        _patiently(node, "CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))
        if number < masters:
            first, end = (SLOTS * at // masters for at in (number, number + 1))
            node.command("CLUSTER", "ADDSLOTSRANGE", str(first), str(end - 1))
    ids = [_text(node.command("CLUSTER", "MYID")) for node in nodes]
    # Each meets each: news by way of a third node would take seconds.
    for number, node in enumerate(nodes):
        for other in nodes[number + 1 :]:
            node.command("CLUSTER", "MEET", "127.0.0.1", str(other.port), other.settings["cluster-port"])
    for replica, node in enumerate(nodes[masters:]):
        _patiently(node, "CLUSTER", "REPLICATE", ids[replica % masters])


def _patiently(node: LocalNode, *parts: str) -> None:
    """A command that needs the server to be up, or to have heard of another one."""
    limit = time.monotonic() + _START_S
    while True:
        try:
            node.command(*parts)
            return
        except (OSError, RemoteError):
            if time.monotonic() > limit or node.process is None or node.process.poll() is not None:
                raise
            time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@contextlib.contextmanager
def local_cluster(folder: Path, masters: int = 3, replicas: int = 0) -> Iterator[LocalCluster]:
    """A cluster that serves, while the block runs."""
    cluster = start_cluster(folder, masters, replicas)
    try:
        cluster.wait()
        yield cluster
    finally:
        cluster.stop()
