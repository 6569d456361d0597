"""What a cluster looks like from outside: its nodes, and what would make rows unavailable."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hstu_trt.tables.remote_cluster import Cluster
from hstu_trt.tables.remote_layout import COMPLETE, PUSHED, table_key
from hstu_trt.tables.remote_resp import RemoteError, Reply, text_of

SLOTS = 16384


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """One server."""

    node: str
    role: str
    """master, replica, or "" if it does not answer."""
    slots: int
    """Slots that it is master of."""
    reply_ms: float | None
    """None if it does not answer."""
    used_bytes: int = 0
    most_bytes: int = 0
    """0: no limit."""
    eviction: str = ""
    full_coverage: str = ""
    """``yes``: one range without a master stops all reads. "" where CONFIG GET is not allowed."""
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class ClusterState:
    """All servers, and sentences about what is wrong."""

    nodes: tuple[NodeState, ...]
    warnings: tuple[str, ...]
    slots_served: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cluster_state(cluster: Cluster) -> ClusterState:
    """Asks every node. Raises RemoteError if none knows the map of slots."""
    ranges = _ranges(cluster)
    masters: dict[str, int] = {}
    replicas: dict[str, int] = {}
    for first, last, servers in ranges:
        masters[servers[0]] = masters.get(servers[0], 0) + last - first + 1
        replicas[servers[0]] = max(replicas.get(servers[0], 0), len(servers) - 1)
    names = {name: None for _, _, servers in ranges for name in servers} | dict.fromkeys(cluster.breakers())
    nodes = tuple(_node_state(cluster, name, masters.get(name, 0)) for name in names)
    # A master that is down stays in the map until a replica takes over.
    silent = {node.node for node in nodes if node.trouble}
    served = sum(slots for name, slots in masters.items() if name not in silent)
    return ClusterState(nodes=nodes, warnings=tuple(_warnings(nodes, replicas, served)), slots_served=served)


def _ranges(cluster: Cluster) -> list[tuple[int, int, list[str]]]:
    """(first slot, last slot, master and replicas)."""
    trouble = "no node is known"
    for name in cluster.breakers():
        try:
            reply = cluster.execute("CLUSTER", "SLOTS", node=name)
        except RemoteError as error:
            trouble = str(error)
            continue
        host = name.rpartition(":")[0]
        return [_range(entry, host) for entry in reply] if isinstance(reply, list) else []
    raise RemoteError(f"no node tells the map of slots: {trouble}")


def _range(entry: Reply, host: str) -> tuple[int, int, list[str]]:
    if not isinstance(entry, list) or len(entry) < 3:
        raise RemoteError(f"CLUSTER SLOTS answered {entry!r}")
    first, last, *servers = entry
    names = [f"{text_of(server[0]) or host}:{text_of(server[1])}" for server in servers if isinstance(server, list)]
    return int(text_of(first)), int(text_of(last)), names


def _node_state(cluster: Cluster, name: str, slots: int) -> NodeState:
    started = time.monotonic()
    try:
        info = _info(cluster.execute("INFO", node=name))
    except RemoteError as error:
        return NodeState(node=name, role="", slots=slots, reply_ms=None, trouble=str(error))
    reply_ms = (time.monotonic() - started) * 1e3
    return NodeState(
        node=name,
        role="master" if info.get("role") == "master" else "replica",
        slots=slots,
        reply_ms=round(reply_ms, 2),
        used_bytes=int(info.get("used_memory", "0")),
        most_bytes=int(info.get("maxmemory", "0")),
        eviction=info.get("maxmemory_policy", ""),
        full_coverage=_setting(cluster, name, "cluster-require-full-coverage"),
    )


def _info(reply: Reply) -> dict[str, str]:
    lines = text_of(reply).splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _setting(cluster: Cluster, node: str, name: str) -> str:
    try:
        reply = cluster.execute("CONFIG", "GET", name, node=node)
    except RemoteError:
        return ""
    return text_of(reply[1]) if isinstance(reply, list) and len(reply) == 2 else ""


def _warnings(nodes: tuple[NodeState, ...], replicas: Mapping[str, int], served: int) -> list[str]:
    found = [f"{node.node} does not answer: {node.trouble}" for node in nodes if node.trouble]
    if served < SLOTS:
        found.append(f"{SLOTS - served} of {SLOTS} slots are not served: their rows are unavailable")
    for node in nodes:
        if node.full_coverage == "yes":
            found.append(f"{node.node}: cluster-require-full-coverage is yes, so that one dead node stops all reads")
        if node.eviction not in ("", "noeviction"):
            found.append(f"{node.node}: maxmemory-policy is {node.eviction}, so that rows may vanish; use noeviction")
        if node.slots and not replicas.get(node.node):
            found.append(f"{node.node} has no replica: its rows are unavailable while it is down")
    return found


def table_versions(cluster: Cluster, table: str) -> dict[str, dict[str, Any]]:
    """version -> rows, rows pushed, whether it is complete and in use."""
    reply = cluster.execute("HGETALL", table_key(table))
    if not isinstance(reply, list):
        raise RemoteError(f"table {table!r}: HGETALL answered {reply!r}")
    fields = dict(zip(map(text_of, reply[::2]), map(text_of, reply[1::2]), strict=True))
    found = {}
    for name in sorted(field.removeprefix("version:") for field in fields if field.startswith("version:")):
        values = cluster.execute("HMGET", f"e:{{{table}:{name}}}", "rows", PUSHED, COMPLETE)
        rows, pushed, complete = map(text_of, values) if isinstance(values, list) else ("", "", "")
        found[name] = {
            "rows": int(rows or 0),
            "pushed": int(pushed or 0),
            "complete": complete == "1",
            "current": fields.get("current") == name,
        }
    return found
