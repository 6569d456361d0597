"""``tables.json`` of a deployment: which tier holds each table, and how a remote one is reached.

    {"default": {"tier": "mapped"},
     "tables": {"item_id": {"tier": "remote", "nodes": ["10.0.0.1:6379", "10.0.0.2:6379"], "deadline_ms": 15,
                            "local_copy": false, "on_failure": "default", "password_file": "/run/secrets/redis"},
                "user_id": {"tier": "resident"}}}

``mapped`` reads rows from the files as lookups touch them, ``resident`` reads all of them into huge pages at start,
``remote`` asks a Redis or Valkey Cluster. ``default`` is what the tables that are not named have. The file holds no
secrets: a password comes from the first line of ``password_file`` or from the environment (``remote_cluster.py``).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.tables.remote import OnFailure
from hstu_trt.tables.remote_cluster import ClusterOptions, Credentials, Tls

Tier = Literal["mapped", "resident", "remote"]
TIERS: tuple[Tier, ...] = get_args(Tier)
FILE = "tables.json"
_PATHS = ("password_file", "tls_ca", "tls_cert", "tls_key")
_SECRETS = ("password", "passwd", "pass", "requirepass", "user", "username", "auth", "login", "token", "secret")
_LEAST_DEADLINE_MS = 0.001


@dataclass(frozen=True, kw_only=True)
class Remote:
    """How the rows of a remote table are had. Tables of equal settings share connections and round trips."""

    nodes: tuple[str, ...]
    """``host:port`` of any nodes of the cluster."""
    deadline_ms: float = 15.0
    """For all rows of a request."""
    local_copy: bool = True
    """Whether the tables folder holds the rows too, for those that the cluster does not give."""
    on_failure: OnFailure = "fail"
    """Without a local copy: ``fail`` the request, or answer the ``default`` row (zeros under other id policies)."""
    password_file: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    def __post_init__(self) -> None:
        if not _LEAST_DEADLINE_MS <= self.deadline_ms <= 60_000:
            raise ConfigError(
                f"deadline_ms {self.deadline_ms:g}: more than 0 is needed ({_LEAST_DEADLINE_MS:g}), at most 60000"
            )
        if self.on_failure not in get_args(OnFailure):
            raise ConfigError(f"on_failure {self.on_failure!r}: choose from {', '.join(get_args(OnFailure))}")
        if self.local_copy and self.on_failure == "default":
            raise ConfigError(
                'on_failure "default" is for rows that are nowhere else, and the local copy has them all; '
                'add "local_copy": false, or leave on_failure out'
            )
        ClusterOptions(nodes=self.nodes, tls=self._tls())

    def cluster_options(self) -> ClusterOptions:
        """How to reach the cluster, the login read now. Raises ConfigError."""
        password_file = Path(self.password_file) if self.password_file else None
        return ClusterOptions(nodes=self.nodes, credentials=Credentials.read(password_file), tls=self._tls())

    def _tls(self) -> Tls | None:
        authorities, certificate, key = (Path(n) if n else None for n in (self.tls_ca, self.tls_cert, self.tls_key))
        wanted = self.tls or any((authorities, certificate, key))
        return Tls(authorities=authorities, certificate=certificate, key=key) if wanted else None


@dataclass(frozen=True, kw_only=True)
class TableTier:
    """Where one table's rows are."""

    tier: Tier = "mapped"
    remote: Remote | None = None

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise ConfigError(f"tier {self.tier!r}: choose from {', '.join(TIERS)}")
        if (self.tier == "remote") != (self.remote is not None):
            raise ConfigError(f"tier {self.tier!r}: only remote tables have nodes, and they need some")

    @property
    def needs_files(self) -> bool:
        """Whether the tables folder must hold the rows."""
        return self.remote is None or self.remote.local_copy


@dataclass(frozen=True, kw_only=True)
class TierSettings:
    """The tiers of all tables of a deployment."""

    tables: Mapping[str, TableTier] = field(default_factory=dict)
    default: TableTier = TableTier()

    def of(self, table: str) -> TableTier:
        """The tier of a table."""
        return self.tables.get(table, self.default)

    @property
    def may_lack_rows(self) -> bool:
        """Whether some table's rows are in a cluster alone."""
        return any(not tier.needs_files for tier in (self.default, *self.tables.values()))

    def check_names(self, known: Iterable[str]) -> None:
        """Refuses settings of tables that are not there. Raises ConfigError."""
        known = sorted(known)
        for name in self.tables:
            if name not in known:
                raise ConfigError(f"{FILE}: there is no table {name!r}{_hint(name, known)}; tables: {', '.join(known)}")

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads back."""
        return {"default": _entry(self.default), "tables": {name: _entry(tier) for name, tier in self.tables.items()}}

    @classmethod
    def from_json(cls, document: object) -> TierSettings:
        """Raises ConfigError naming table, key and value."""
        if not isinstance(document, dict):
            raise ConfigError(f"{FILE} holds {type(document).__name__}, not an object")
        _known_keys(FILE, document, {"default", "tables"})
        named = document.get("tables", {})
        if not isinstance(named, dict):
            raise ConfigError(f"{FILE}: 'tables' must be an object of tables, got {_kind(named)}")
        default = _tier(f"{FILE}: default", document.get("default", {"tier": "mapped"}))
        return cls(tables={n: _tier(f"{FILE}: table {n!r}", entry) for n, entry in named.items()}, default=default)


def read_tier_settings(path: Path) -> TierSettings:
    """Reads a ``tables.json``; relative paths in it begin in its folder.

    Raises ArtefactError for an unreadable file, ConfigError for wrong settings.
    """
    try:
        document = json.loads(path.read_bytes(), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} cannot be read as JSON ({error})") from None
    settings, folder = TierSettings.from_json(document), path.resolve().parent
    tables = {name: _anchored(tier, folder) for name, tier in settings.tables.items()}
    return TierSettings(tables=tables, default=_anchored(settings.default, folder))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of two equal keys; whoever wrote both meant both."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"{FILE}: key {name!r} is there twice")
        found[name] = value
    return found


def _anchored(tier: TableTier, folder: Path) -> TableTier:
    if tier.remote is None:
        return tier
    given = {name: getattr(tier.remote, name) for name in _PATHS}
    absolute: dict[str, Any] = {n: None if value is None else str(folder / value) for n, value in given.items()}
    return dataclasses.replace(tier, remote=dataclasses.replace(tier.remote, **absolute))


def _tier(where: str, entry: object) -> TableTier:
    if not isinstance(entry, dict):
        raise ConfigError(f'{where}: expected an object such as {{"tier": "resident"}}, got {_kind(entry)}')
    tier = entry.get("tier", "mapped")
    known = {f.name for f in dataclasses.fields(Remote)} if tier == "remote" else set()
    _known_keys(where, entry, {"tier", *known})
    options = {name: value for name, value in entry.items() if name in known}
    try:
        return TableTier(tier=tier, remote=Remote(**_checked(options)) if tier == "remote" else None)
    except (ConfigError, TypeError) as error:
        raise ConfigError(
            f"{where}: {error if isinstance(error, ConfigError) else 'a remote table needs nodes'}"
        ) from None


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the right types. What may be a secret in the wrong place is not repeated in messages."""
    found = dict(options)
    for name, value in options.items():
        if name == "nodes":
            if not isinstance(value, list) or not all(isinstance(node, str) for node in value):
                raise ConfigError(f'nodes must be a list such as ["10.0.0.1:6379"], got {_kind(value)}')
            found[name] = tuple(value)
        elif name in ("local_copy", "tls"):
            _require(name, value, bool, "true or false")
        elif name == "deadline_ms":
            _require(name, value, (int, float), "milliseconds")
        elif name == "on_failure":
            _require(name, value, str, "a text")
        elif value is not None and not (isinstance(value, str) and value):
            raise ConfigError(f"{name} must be the path of a file, got {_kind(value) if value else 'none'}")
    if found.get("tls") is False and any(found.get(name) for name in ("tls_ca", "tls_cert", "tls_key")):
        raise ConfigError('tls_ca, tls_cert and tls_key ask for TLS, and "tls" is false; leave one of the two out')
    return found


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _require(name: str, value: object, kind: type | tuple[type, ...], text: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{name} must be {text}, got {value!r}")


def _known_keys(where: str, entry: Mapping[str, object], known: set[str]) -> None:
    for key in entry:
        if key.lower().strip("_") in _SECRETS:
            raise ConfigError(
                f"{where}: {key!r} does not belong into a deployment; name a password_file, or set "
                "HSTU_TRT_REDIS_PASSWORD and HSTU_TRT_REDIS_USER"
            )
        if key in known or key.startswith("_"):
            continue
        raise ConfigError(f"{where}: unknown key {key!r}{_hint(key, known)}")


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _entry(tier: TableTier) -> dict[str, Any]:
    if tier.remote is None:
        return {"tier": tier.tier}
    given = {name: value for name, value in dataclasses.asdict(tier.remote).items() if value not in (None, False)}
    given["local_copy"] = tier.remote.local_copy
    return {"tier": tier.tier, **given}
