"""The gateway's nginx.conf: which requests pass, to which replica, and what a client is told when they do not.

- A user's requests go to one replica: consistent hashing of the metadata ``x-user-id``, on a ring that knows replicas
  by address. One that is ``down`` keeps its place, so its users come back to it; the others' users never move.
- A request goes to a second replica only if none of it reached the first: connection refused, or no connection in time.
  nginx passes gRPC bodies on as they come, so it could not repeat one; a client can (``client.py``).
- What is not listed in ``OPEN_METHODS`` is refused, model control, shared memory, trace and log settings included.
- Compressed messages are refused: a few of their bytes may hold gigabytes, which Triton unpacks before it looks.
- With TLS, clients' certificates are checked here; replicas listen on loopback alone, and speak plain gRPC with nginx.
- What nginx itself refuses is told as a gRPC status with a message, not as a page in HTML.
"""

from __future__ import annotations

import grp
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.serving.signature import REPLICA_LOST, USER_METADATA
from hstu_trt.serving.tls import ServerTls

OPEN_METHODS = (
    "ModelInfer", "ModelReady", "ModelConfig", "ModelMetadata", "ModelStatistics",
    "ServerLive", "ServerReady", "ServerMetadata",
)  # fmt: skip
_CONNECTIONS = 8192
MOST_HEADER_BYTES = 8192
"""Names and values of a request's headers, in all; nginx ends a connection that brings more, before a replica sees it.

A server of gRPC would do so beyond 16 KiB."""
_INVALID_ARGUMENT, _PERMISSION_DENIED, _UNIMPLEMENTED, _UNAVAILABLE, _UNAUTHENTICATED = 3, 7, 12, 14, 16
_ROOM_FOR_NAMES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Upstream:
    """A replica as the gateway knows it."""

    address: str
    """host:port, its name on the ring."""
    down: bool = False
    """Gets no requests, and keeps its place."""


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """What the operator chooses."""

    address: str
    port: int
    max_body: int
    """Bytes of a request."""
    tls: ServerTls | None = None
    timeout_s: int = 60
    """Between two reads or writes; a client's own deadline is what should be shorter."""


def largest_request(model: ModelFolder) -> int:
    """Bytes that the largest request within a model's limits takes, and room for what gRPC adds."""
    config, limits = model.ranking_config, model.limits
    columns = len(config.uih_features) + len(config.candidate_features) + 3
    events = limits.users * (limits.history + limits.candidates + len(config.contextual_slots) + 2)
    return 8 * columns * events + _ROOM_FOR_NAMES


def render(settings: GatewaySettings, upstreams: Sequence[Upstream], folder: Path) -> str:
    """The text of nginx.conf."""
    servers = "\n".join(
        f"        server {upstream.address} {'down' if upstream.down else 'max_fails=1 fail_timeout=1s'};"
        for upstream in upstreams
    )
    timeout = settings.timeout_s
    return f"""# Written by hstu-trt fleet; changes are lost.
daemon off;
{_worker_user()}worker_processes {min(4, os.cpu_count() or 1)};
worker_rlimit_nofile {_open_files()};
worker_shutdown_timeout {2 * timeout}s;
pid {_quoted(folder / "nginx.pid")};
error_log {_quoted(folder / "nginx.log")} warn;
events {{ worker_connections {_CONNECTIONS}; }}
http {{
    access_log off;
    server_tokens off;
{_temporary_folders(folder)}
    map $http_{USER_METADATA.replace("-", "_")} $route {{
        "" $request_id;
        default $http_{USER_METADATA.replace("-", "_")};
    }}
    map $http_grpc_encoding $compressed {{
        "" 0;
        identity 0;
        default 1;
    }}
    upstream replicas {{
        zone replicas 256k;
        hash $route consistent;
{servers}
        keepalive 64;
        keepalive_requests 1000000;
    }}
    server {{
        listen {settings.address}:{settings.port} {"ssl " if settings.tls else ""}http2 backlog=4096;
{_tls(settings.tls)}
        http2_max_concurrent_streams 1024;
        keepalive_requests 1000000;
        keepalive_timeout 600s;
        client_header_timeout 10s;
        client_body_timeout 10s;
        client_max_body_size {settings.max_body};
        large_client_header_buffers 1 {MOST_HEADER_BYTES};
        default_type application/grpc;
        grpc_connect_timeout 500ms;
        grpc_read_timeout {timeout}s;
        grpc_send_timeout {timeout}s;
        grpc_next_upstream error timeout;
        grpc_next_upstream_tries 2;
        grpc_buffer_size 64k;
        # A second header of that name does not slip through: none is passed on.
        grpc_set_header grpc-encoding "";
        if ($compressed) {{ return 415; }}
        location ~ ^/inference\\.GRPCInferenceService/({"|".join(OPEN_METHODS)})$ {{ grpc_pass grpc://replicas; }}
        location = /grpc.health.v1.Health/Check {{ grpc_pass grpc://replicas; }}
{_refusal("/", _PERMISSION_DENIED, "the gateway lets no such method through")}
{_refusal("@too_large", _INVALID_ARGUMENT, f"the request is larger than the {settings.max_body} bytes that are served")}
{_refusal("@unavailable", _UNAVAILABLE, REPLICA_LOST)}
{_refusal("@compressed", _UNIMPLEMENTED, "the gateway takes messages without compression only")}
{_refusal("@malformed", _INVALID_ARGUMENT, "not a gRPC request")}
{_refusal("@stranger", _UNAUTHENTICATED, "the gateway takes clients with a certificate of its clients' CA only")}
        error_page 413 @too_large;
        error_page 495 496 @stranger;
        error_page 415 @compressed;
        error_page 502 503 504 @unavailable;
        error_page 400 405 408 411 414 494 @malformed;
    }}
}}
"""


def _tls(tls: ServerTls | None) -> str:
    """Directives of the server block. Raises ConfigError for a path that nginx would read as something else."""
    if tls is None:
        return ""
    files = {"ssl_certificate": tls.cert, "ssl_certificate_key": tls.key}
    lines = ["ssl_protocols TLSv1.2 TLSv1.3;"]
    if tls.client_ca is not None:
        files["ssl_client_certificate"] = tls.client_ca
        lines += ["ssl_verify_client on;", "ssl_verify_depth 3;"]
    for directive, path in files.items():
        if set(str(path)) & set('"\\$\n'):
            raise ConfigError(f"{str(path)!r}: nginx takes no path with a quote, a backslash, a dollar or a line break")
        lines.append(f'{directive} "{path}";')
    return "\n".join(f"        {line}" for line in lines)


def _refusal(location: str, status: int, message: str) -> str:
    return (
        f"        location {location} {{\n"
        f"            add_header grpc-status {status} always;\n"
        f'            add_header grpc-message "{message}" always;\n'
        "            return 200;\n        }"
    )


def _temporary_folders(folder: Path) -> str:
    """nginx makes them all, whether it uses them or not, and its own are root's."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "\n".join(f"    {kind}_temp_path {_quoted(folder / f'tmp_{kind}')};" for kind in kinds)


def _quoted(path: Path) -> str:
    """A path as a directive without variables takes it, whatever it is made of."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _worker_user() -> str:
    """Workers of a root's nginx give up its rights; nginx looks for a group that Debian does not have."""
    if os.geteuid() != 0:
        return ""
    groups = {group.gr_name for group in grp.getgrall()}
    return f"user nobody {'nogroup' if 'nogroup' in groups else 'nobody'};\n"


def _open_files() -> int:
    """Two per connection, as far as this process may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(2 * _CONNECTIONS + 64, hard if hard != resource.RLIM_INFINITY else 2 * _CONNECTIONS + 64)
