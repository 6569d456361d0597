"""``hstu-trt tables push|cluster-publish|cluster-retire|cluster-status``: tables in a Redis or Valkey Cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.text import bytes_text, text_table
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions, Credentials, Tls
from hstu_trt.tables.remote_push import Push, publish, retire
from hstu_trt.tables.remote_state import SLOTS, cluster_state, table_versions
from hstu_trt.tables.terminal import Progress, Verbs, json_option


def add_parsers(verbs: Verbs) -> None:
    """Adds the verbs' parsers."""
    reach, shared = _reach(), json_option()
    versioned = argparse.ArgumentParser(add_help=False)
    versioned.add_argument("--table", required=True)
    versioned.add_argument("--version", required=True, help="name of the version; versions never change")

    def verb(name: str, run: Callable[..., int], text: str, *parents: argparse.ArgumentParser) -> Any:
        one = verbs.add_parser(name, parents=[shared, reach, *parents], help=text, description=text)
        one.set_defaults(run=run)
        return one

    text = "bring a table into a cluster as a new version and read every row back; called again, it goes on"
    push = verb("push", _push, text, versioned)
    push.add_argument("folder", type=Path, help="the tables folder")
    push.add_argument(
        "--partitions", type=int, help="keys per version, a power of two (default: by the bytes of the table)"
    )
    push.add_argument("--publish", action="store_true", help="make it the version in use")
    verb(
        "cluster-publish",
        _publish,
        "make a complete version the one in use; also the way back to an older one",
        versioned,
    )
    text = (
        "let a version expire that neither the cluster nor any server's tables folder has in use, after the last "
        "request that began with it; pushing it again undoes that"
    )
    one = verb("cluster-retire", _retire, text, versioned)
    one.add_argument("--after", type=int, default=600, metavar="SECONDS", help="(default: 600)")
    text = "the nodes of a cluster and what would make rows unavailable; exit code 1 if some are"
    one = verb("cluster-status", _status, text)
    one.add_argument("--table", help="also list this table's versions")


def _reach() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group(
        "cluster", "A login comes from --password-file or HSTU_TRT_REDIS_PASSWORD, its user from HSTU_TRT_REDIS_USER."
    )
    group.add_argument("--cluster", required=True, metavar="HOST:PORT,...", help="any nodes of it")
    group.add_argument("--password-file", type=Path, help="its first line is the password")
    group.add_argument("--tls", action="store_true", help="TLS, trusting the system's authorities")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="TLS, trusting these authorities (PEM)")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="the client's own certificate (PEM)")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key (PEM)")
    return parser


def _open(options: argparse.Namespace) -> Cluster:
    tls = None
    if options.tls or options.tls_ca or options.tls_cert or options.tls_key:
        tls = Tls(authorities=options.tls_ca, certificate=options.tls_cert, key=options.tls_key)
    nodes = tuple(options.cluster.split(","))
    return Cluster(ClusterOptions(nodes=nodes, credentials=Credentials.read(options.password_file), tls=tls))


def _push(options: argparse.Namespace) -> int:
    with _open(options) as cluster:
        push = Push(cluster, options.folder, options.table, options.version, options.partitions)
        size = push.version.rows * push.version.value_bytes
        line = Progress(2 * size, "pushed and verified")
        done = push.run(line.add)
        line.end()
        if options.publish:
            publish(cluster, options.table, options.version)
    if options.json:
        print(json.dumps({"rows": push.version.rows, "written": done.rows_written, "verified": done.rows_verified}))
        return 0
    print(
        f"table {options.table}, version {options.version}: {push.version.rows} rows, {bytes_text(size)}, "
        f"{done.rows_written} written now, every row read back{'; in use' if options.publish else ''}"
    )
    return 0


def _publish(options: argparse.Namespace) -> int:
    with _open(options) as cluster:
        before = publish(cluster, options.table, options.version)
    if options.json:
        print(json.dumps({"current": options.version, "before": before}))
    else:
        print(f"table {options.table}: version {options.version} is in use{f', {before} was' if before else ''}")
    return 0


def _retire(options: argparse.Namespace) -> int:
    if options.after < 1:
        raise ConfigError(f"--after {options.after}: at least one second")
    with _open(options) as cluster:
        keys = retire(cluster, options.table, options.version, options.after)
    if options.json:
        print(json.dumps({"keys": keys, "after_s": options.after}))
    else:
        print(f"table {options.table}: version {options.version} ({keys} keys) expires in {options.after} s")
    return 0


def _status(options: argparse.Namespace) -> int:
    with _open(options) as cluster:
        state = cluster_state(cluster)
        versions = table_versions(cluster, options.table) if options.table else None
    if options.json:
        print(json.dumps({**state.as_dict(), **({} if versions is None else {"versions": versions})}, indent=1))
        return 0 if state.slots_served == SLOTS else 1
    rows = [
        [
            n.node,
            n.role or "down",
            n.slots,
            "-" if n.reply_ms is None else f"{n.reply_ms:.2f}",
            bytes_text(n.used_bytes),
        ]
        for n in state.nodes
    ]
    print(text_table(["node", "role", "slots", "reply ms", "memory"], [[str(cell) for cell in row] for row in rows]))
    for name, about in (versions or {}).items():
        pushed = "complete" if about["complete"] else f"{about['pushed']} pushed"
        print(f"version {name}: {about['rows']} rows, {pushed}{', in use' if about['current'] else ''}")
    for warning in state.warnings:
        print(f"warning: {warning}")
    return 0 if state.slots_served == SLOTS else 1
