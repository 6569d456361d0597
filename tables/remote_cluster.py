"""A Redis or Valkey Cluster: connections, credentials and commands, through the C++ client in ``csrc/remote/``."""

from __future__ import annotations

import ctypes
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError
from hstu_trt.tables.remote_layout import RemoteVersion
from hstu_trt.tables.remote_library import ERROR_BYTES, REPLY, Job, Options, remote_library
from hstu_trt.tables.remote_resp import RemoteError, Reply, decode

USER_VARIABLE = "HSTU_TRT_REDIS_USER"
PASSWORD_VARIABLE = "HSTU_TRT_REDIS_PASSWORD"
_INT64 = np.dtype(np.int64)
_ErrorText = ctypes.c_char * ERROR_BYTES
FOUND, MISSING, UNAVAILABLE, SKIPPED, REFUSED = 2, 3, 5, 6, 7
"""A row's status as capi.h numbers it."""


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """Who the client is. Never printed."""

    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, password_file: Path | None = None, environment: Mapping[str, str] = os.environ) -> Credentials:
        """From the first line of a file, or from HSTU_TRT_REDIS_PASSWORD; the user from HSTU_TRT_REDIS_USER.

        Without either there is no login. Raises ConfigError.
        """
        user = environment.get(USER_VARIABLE) or None
        if password_file is None:
            return cls(user=user, password=environment.get(PASSWORD_VARIABLE) or None)
        try:
            lines = password_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the password file {password_file} cannot be read ({error})") from None
        if not lines or not lines[0]:
            raise ConfigError(f"the first line of the password file {password_file} is empty")
        return cls(user=user, password=lines[0])


@dataclass(frozen=True, kw_only=True)
class Tls:
    """TLS 1.2 or later; nodes must show a certificate for the host or address that they are reached by."""

    authorities: Path | None = None
    """PEM file of certificates to trust; None: the system's."""
    certificate: Path | None = None
    """The client's own certificate, where the cluster asks for one, and its key."""
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a client certificate and its key come together: give both or none")


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """How a cluster is reached."""

    nodes: tuple[str, ...]
    """``host:port`` of any nodes; the others are found through them."""
    credentials: Credentials = Credentials()
    tls: Tls | None = None
    breaker_failures: int = 3
    """Failures in a row after which a node is passed over."""
    breaker_open_ms: float = 500.0
    """Time until a request tries such a node again."""
    rows_per_command: int = 512
    replica_reads: bool = True
    """Ask a replica where the master is down or silent."""
    connect_ms: float = 2000.0

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError("nodes of a cluster are written host:port, got none")
        for node in self.nodes:
            _check_node(node)


def _check_node(node: str) -> None:
    """Refuses what is not host:port, without repeating what may hold a password: nodes are printed everywhere."""
    host, _, port = node.rpartition(":")
    if not re.fullmatch(r"[\w.:\[\]-]*", node, re.ASCII):
        raise ConfigError(
            "nodes of a cluster are written host:port, without scheme and login, got one with other characters; a "
            f"password comes from a password file or {PASSWORD_VARIABLE}, a user from {USER_VARIABLE}"
        )
    if not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII):
        raise ConfigError(f"nodes of a cluster are written host:port, got {node}")
    if not 1 <= int(port) <= 65535:
        raise ConfigError(f"node {node}: a port is between 1 and 65535")


class Cluster:
    """An open client. Threads may share it."""

    def __init__(self, options: ClusterOptions) -> None:
        """Connects and reads the slot map. Raises RemoteError."""
        self._library = remote_library()
        error = _ErrorText()
        native = _native(options)
        self._handle = self._library.open(ctypes.byref(native), _us(options.connect_ms), error, ERROR_BYTES)
        if not self._handle:
            raise RemoteError(f"cluster {','.join(options.nodes)}: {_text(error)}")
        self._close = weakref.finalize(self, self._library.close, self._handle)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections; no other call may be in progress."""
        self._close()
        self._handle = None

    def execute(self, *parts: str | bytes, node: str | None = None, deadline_ms: float = 1000.0) -> Reply:
        """Runs a command: at the node ``host:port``, or at the one that serves the key in ``parts[1]``.

        Raises RemoteError if no node answered, or one answered with an error.
        """
        encoded = [part if isinstance(part, bytes) else part.encode() for part in parts]
        texts = (ctypes.c_char_p * len(encoded))(*encoded)
        sizes = (ctypes.c_size_t * len(encoded))(*map(len, encoded))
        replies: list[bytes] = []
        error = _ErrorText()
        failed = self._library.execute(
            self._open(), node.encode() if node else None, len(encoded), texts, sizes, _us(deadline_ms),
            _collector(replies), None, error, ERROR_BYTES,
        )  # fmt: skip
        if failed:
            raise RemoteError(_text(error) or "no node answered")
        return decode(replies[0])

    def read(self, jobs: Sequence[RowsJob], deadline_ms: float) -> str:
        """Fills values and status of all jobs; returns what went wrong first, or ""."""
        error = _ErrorText()
        native = (Job * len(jobs))(*(job.native() for job in jobs))
        if self._library.read(self._open(), native, len(jobs), _us(deadline_ms), error, ERROR_BYTES):
            raise RemoteError(_text(error))
        return _text(error)

    def write(self, job: RowsJob, deadline_ms: float) -> str:
        """Writes distinct rows and fills their status; returns what went wrong first, or ""."""
        error = _ErrorText()
        native = job.native()
        if self._library.write(self._open(), ctypes.byref(native), _us(deadline_ms), error, ERROR_BYTES):
            raise RemoteError(_text(error))
        return _text(error)

    def breakers(self) -> dict[str, bool]:
        """Node ``host:port`` -> whether its breaker is open."""
        replies: list[bytes] = []
        self._library.nodes(self._open(), _collector(replies), None)
        lines = (line.rsplit(" ", 1) for line in replies[0].decode().splitlines())
        return {node: state == "open" for node, state in lines}

    def counters(self) -> dict[str, int]:
        """What happened since the client was opened; rows are counted once per request."""
        names = self._library.counter_names
        values = (ctypes.c_uint64 * len(names))()
        self._library.counters(self._open(), values)
        return dict(zip(names, values, strict=True))

    def _open(self) -> int:
        if self._handle is None:
            raise RemoteError("the client of the cluster is closed")
        handle: int = self._handle
        return handle


class RemoteRows:
    """A version of a table in the client's terms."""

    def __init__(self, version: RemoteVersion) -> None:
        library = remote_library()
        prefix = version.key_prefix.encode()
        self.row_bytes = version.value_bytes
        self.handle = library.table(prefix, version.partitions, version.value_bytes)
        if not self.handle:
            raise ConfigError(
                f"table {version.table!r}: {version.partitions} partitions of rows of {version.value_bytes} bytes; "
                "partitions must be a power of two, rows 1 byte to 1 MiB"
            )
        weakref.finalize(self, library.table_free, self.handle)


@dataclass(frozen=True, kw_only=True)
class RowsJob:
    """Rows to read or write."""

    table: RemoteRows
    rows: NDArray
    """``[n]`` int64, contiguous; a negative one stands for a row of zeros."""
    values: NDArray
    """``[n, ...]`` of any dtype, ``row_bytes`` contiguous bytes each."""
    status: NDArray
    """``[n]`` uint8, contiguous."""

    def native(self) -> Job:
        """The structure of the C face; it points into the arrays."""
        row = self.values[:1]
        fits = row.nbytes == self.table.row_bytes * len(row) and row.flags.c_contiguous
        if not fits or self.rows.dtype != _INT64 or not len(self.rows) == len(self.values) == len(self.status):
            raise ValueError(f"rows {self.rows.dtype}{self.rows.shape}, values {self.values.dtype}{self.values.shape}")
        return Job(
            self.table.handle, _address(self.rows), len(self.rows), _address(self.values),
            self.values.strides[0], _address(self.status),
        )  # fmt: skip


def _address(array: NDArray) -> int:
    """Of the first element. ``array.ctypes`` imports, and makes objects: too much for each array of each request."""
    address: int = array.__array_interface__["data"][0]
    return address


def _native(options: ClusterOptions) -> Options:
    def path(name: str) -> bytes | None:
        value = getattr(options.tls, name, None)
        return str(value).encode() if value is not None else None

    user, password = options.credentials.user, options.credentials.password
    return Options(
        ",".join(options.nodes).encode(), user.encode() if user else None, password.encode() if password else None,
        int(options.tls is not None), path("authorities"), path("certificate"), path("key"),
        options.breaker_failures, _us(options.breaker_open_ms), options.rows_per_command, int(options.replica_reads),
    )  # fmt: skip


def _collector(replies: list[bytes]) -> ctypes._FuncPointer:
    return REPLY(lambda data, size, _: replies.append(ctypes.string_at(data, size) if size else b""))


def _us(milliseconds: float) -> int:
    return round(milliseconds * 1000)


def _text(error: ctypes.Array) -> str:
    return error.value.decode(errors="replace")
