"""Finding a tritonserver, and how to launch it on a deployment (``server_process.py`` runs it)."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import secrets
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.plugin_files import autoload_library
from hstu_trt.serving.deployment import RUN_VARIABLE, Deployment
from hstu_trt.serving.guard import (
    door_environment,
    find_guard,
    guard_doors,
    guard_environment,
    guard_limits,
)
from hstu_trt.serving.tls import ClientTls, ServerTls
from hstu_trt.serving.wheel_backend import check_libraries, prepare_backends, wheel_environment

NGC_BINARY = Path("/opt/tritonserver/bin/tritonserver")
LOOPBACK = "127.0.0.1"
DEFAULT_GRPC_PORT = 8001
EXIT_TIMEOUT_S = 30
# Older servers can be killed by a crafted HTTP request; see NVIDIA's security bulletins of 2025 and 2026.
SAFE_HTTP_VERSION = (2, 69)
_METRICS_PORT = "--metrics-port="
_CLOSED_PROTOCOLS = "shared-memory,model-repository,trace,logging"
_FREE_PORTS = range(10_000, 18_000)
"""Below those for outgoing connections (Linux: from 32,768 on), and those where a fleet puts its replicas."""
_SHELL_READS = frozenset(" \t\n\"'\\$`&;|<>(){}[]*?")


@dataclass(frozen=True, kw_only=True)
class Tritonserver:
    """An installed tritonserver. ``wheel`` is its root inside the nvidia-pytriton wheel, None for an NGC install."""

    binary: Path
    wheel: Path | None = None

    @property
    def origin(self) -> str:
        """Where it comes from, for people."""
        return "nvidia-pytriton wheel" if self.wheel else "NGC install"


def find_tritonserver(given: Path | None = None) -> Tritonserver:
    """The given binary, else NVIDIA's container install, else the one in the nvidia-pytriton wheel.

    Raises ArtefactError that says how to get one.
    """
    if given is not None:
        if not (given.is_file() and os.access(given, os.X_OK)):
            raise ArtefactError(f"--tritonserver {given}: no such program")
        root = given.resolve().parents[1]
        return Tritonserver(binary=given.resolve(), wheel=root if (root / "python_backend_stubs").is_dir() else None)
    if NGC_BINARY.is_file():
        return Tritonserver(binary=NGC_BINARY)
    spec = importlib.util.find_spec("pytriton")
    for location in (spec.submodule_search_locations or []) if spec else []:
        root = Path(location) / "tritonserver"
        if (root / "bin" / "tritonserver").is_file():
            return Tritonserver(binary=root / "bin" / "tritonserver", wheel=root)
    raise ArtefactError(
        "no tritonserver found: install nvidia-pytriton (pip install 'hstu-trt[serving]'), run inside NVIDIA's "
        "tritonserver container, or name one with --tritonserver"
    )


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """How to start the server: what ``serve --dry-run`` prints."""

    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Variables to set over the current ones."""
    log: Path
    regions: str
    """How the names of its regions of shared memory begin, and nobody else's."""
    address: str
    grpc_port: int
    tls: ClientTls | None = None
    """How a client on this machine speaks to it; None: without TLS."""

    @property
    def url(self) -> str:
        """host:port of the gRPC service, as a client on this machine reaches it."""
        return f"{self._host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str | None:
        """Where Prometheus reads, seen from this machine; None: closed."""
        ports = [flag.partition("=")[2] for flag in self.command if flag.startswith(_METRICS_PORT)]
        return f"http://{self._host}:{ports[0]}/metrics" if ports else None

    @property
    def _host(self) -> str:
        return LOOPBACK if self.address in ("0.0.0.0", "") else self.address


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Addresses and ports. HTTP stays closed; metrics open only if a port is given."""

    address: str = LOOPBACK
    grpc_port: int | None = None
    """None: 8001, or another if that is taken; 0: any free one."""
    metrics_port: int | None = None
    tls: ServerTls | None = None


def plan_launch(
    server: Tritonserver, deployment: Deployment, listen: Listen, backend_flags: Sequence[str] = ()
) -> LaunchPlan:
    """How to serve a deployment, guarded by its model's limits and its queues. Raises ArtefactError or ConfigError."""
    limits = guard_limits(deployment.model, deployment.served)
    doors = guard_doors(deployment.queue, deployment.flavour)
    return plan_repository(server, deployment.repository, deployment.run, listen, limits, backend_flags, doors)


def plan_repository(
    server: Tritonserver, repository: Path, run_folder: Path, listen: Listen, limits: str,
    backend_flags: Sequence[str] = (), doors: str = "",
) -> LaunchPlan:  # fmt: skip
    """Chooses the ports and prepares the backends folder in ``run_folder``. Raises ArtefactError or ConfigError.

    limits, doors: ``guard_limits`` and ``guard_doors`` of what is served; empty where its requests are not ours.
    """
    _check_shell([repository, run_folder] if server.wheel else [repository])
    port = choose_port(listen.address, listen.grpc_port)
    _make_run_folder(run_folder)
    regions = f"hstu_trt_{secrets.token_hex(8)}_"
    flags = [
        *_server_flags(repository, listen, port),
        f"--backend-config=python,shm-region-prefix-name={regions}",
        *backend_flags,
    ]
    environment = {RUN_VARIABLE: str(run_folder), **(door_environment(doors) if doors else {})}
    if server.wheel is not None:
        guard = find_guard(listen.address, LOOPBACK)
        backends = prepare_backends(server.wheel, run_folder / "backends", guard)
        flags += [f"--backend-directory={backends}", f"--cache-directory={server.wheel / 'caches'}"]
        environment |= {**wheel_environment(server.wheel), **(guard_environment(limits) if guard else {})}
        check_libraries(backends, environment)
    log = run_folder / f"triton-{port}.log"
    return LaunchPlan(
        command=(str(server.binary), *flags),
        environment=environment,
        log=log,
        regions=regions,
        address=listen.address,
        grpc_port=port,
        tls=listen.tls.own_client() if listen.tls else None,
    )


def tensorrt_flags(server: Tritonserver, plugins: Path | None = None) -> tuple[str, ...]:
    """Flags of Triton's TensorRT backend: the library that registers our plugins, which it loads before any plan.

    The backend only logs a library that it cannot load and fails later at a plan, so it is looked for here.
    Raises ArtefactError.
    """
    backend = server.binary.parents[1] / "backends" / "tensorrt" / "libtriton_tensorrt.so"
    if not backend.is_file():
        raise ArtefactError(
            f"this tritonserver ({server.origin}) has no TensorRT backend ({backend} is missing): "
            "run inside NVIDIA's tritonserver container, see docker/Dockerfile"
        )
    if plugins is not None and not plugins.is_file():
        raise ArtefactError(f"--plugins {plugins}: no such file; `make plugins` builds one, found without the option")
    library = plugins or autoload_library()
    return (f"--backend-config=tensorrt,plugins={library.resolve()}",)


def _check_shell(paths: Sequence[Path]) -> None:
    """Triton's Python backend starts its stubs by a line for bash, in which it quotes no path. Raises ConfigError."""
    for path, signs in ((path, sorted(set(str(path)) & _SHELL_READS)) for path in paths):
        if not signs:
            continue
        raise ConfigError(
            f"{str(path)!r} holds {' '.join(map(repr, signs))}, which Triton's Python backend hands to a shell as it "
            "is: put the deployment, and the folder of --run, where no path holds a blank or a sign that shells read"
        )


def _make_run_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArtefactError(f"cannot write to {folder} ({error.strerror}): name another folder with --run") from None


def choose_port(address: str, wanted: int | None) -> int:
    """The wanted port; for None 8001 if free; else any free one. Raises ConfigError when it cannot be had.

    The kernel may give its own free ports to outgoing connections, before a server listens there or while it is
    restarted; others are taken first.
    """
    ports = [wanted] if wanted else [*random.sample(_FREE_PORTS, 20), 0]
    if wanted is None:
        ports.insert(0, DEFAULT_GRPC_PORT)
    try:
        return _first_free(address, ports)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on port {wanted or 0} of {address!r} ({error}); choose another, or 0 for any free one"
        ) from None


def _first_free(address: str, ports: Sequence[int]) -> int:
    """Of ports that may be taken; an address that cannot be had ends it at once. Raises OSError."""
    *others, last = ports
    for port in others:
        try:
            return _bind(address, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    return _bind(address, last)


def _bind(address: str, port: int) -> int:
    """Binds a port for a moment, any free one for 0, and returns its number."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))
        return int(probe.getsockname()[1])


def _server_flags(repository: Path, listen: Listen, port: int) -> list[str]:
    return [
        f"--model-repository={repository}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--exit-on-error=true",
        f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        f"--grpc-address={listen.address}",
        f"--grpc-port={port}",
        # Nobody knows the key, so nobody passes: model control, shared memory, trace and log settings stay closed.
        f"--grpc-restricted-protocol={_CLOSED_PROTOCOLS}:admin-key={secrets.token_hex(16)}",
        "--allow-http=false",
        # Messages that were answered are freed: Triton would keep the largest, and nothing else bounds them.
        "--grpc-infer-allocation-pool-size=0",
        *(listen.tls.flags() if listen.tls else ()),
        *_metrics_flags(listen),
    ]


def _metrics_flags(listen: Listen) -> list[str]:
    if listen.metrics_port is None:
        return ["--allow-metrics=false"]
    port = choose_port(listen.address, listen.metrics_port)
    return [f"--metrics-address={listen.address}", f"{_METRICS_PORT}{port}"]
