"""What ``serve`` offers to those who operate it: where it writes, how it reports, where traces go, what it warns of."""

from __future__ import annotations

import argparse
import ipaddress
import json
import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.server import LaunchPlan, Listen
from hstu_trt.serving.supervision.events import EventFollower, Events

DEFAULT_TRACE_RATE = 100
_KEY = re.compile(r"admin-key=(\w+)$")
_KEY_SHOWS = (
    "warning: the key of Triton's management APIs stays in the process list, since this system lets nobody overwrite "
    "it: every local user may call them (docs/security.md)"
)
# Of /proc/PID/stat behind the program's name: fields 48 and 49, where the command line lies in the process's memory.
_ARGUMENTS_BEGIN, _ARGUMENTS_END = 45, 46


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``serve`` that this module reads."""
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="folder for log and events (default: run/ in the deployment)"
    )
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="standard output for people, or events as JSON"
    )
    parser.add_argument("--trace-otlp", metavar="URL", help="send traces there, e.g. http://host:4318/v1/traces")
    parser.add_argument(
        "--trace-rate",
        type=int,
        default=DEFAULT_TRACE_RATE,
        metavar="N",
        help=f"trace one request of N, and each that comes with a traceparent (default: {DEFAULT_TRACE_RATE})",
    )


def in_run_folder(deployment: Deployment, run: Path | None) -> Deployment:
    """The deployment as it is served: with the run folder of ``--run``."""
    return deployment if run is None else replace(deployment, run_folder=run.resolve())


def trace_flags(url: str | None, rate: int) -> tuple[str, ...]:
    """Triton's flags for OpenTelemetry over OTLP/HTTP. Raises ConfigError."""
    if url is None:
        return ()
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.username is not None:
        raise ConfigError(
            f"--trace-otlp takes http://host:4318/v1/traces without a user, not {_without_user(url)!r}: Triton speaks "
            "plain HTTP to a collector beside it, which then forwards with TLS and credentials"
        )
    if rate < 1:
        raise ConfigError(f"--trace-rate {rate}: one request of N is traced, so N is 1 or more")
    settings = (
        "mode=opentelemetry", "level=TIMESTAMPS", f"rate={rate}", "count=-1", f"opentelemetry,url={url}",
        "opentelemetry,resource=service.name=hstu-trt",
    )  # fmt: skip
    return tuple(f"--trace-config={setting}" for setting in settings)


def _without_user(url: str) -> str:
    return re.sub(r"//[^/]*@", "//...@", url)


def exposure(listen: Listen) -> str | None:
    """What is wrong with listening there without TLS; None on loopback."""
    if listen.tls is not None or _is_loopback(listen.address):
        return None
    return (
        f"WARNING: gRPC on {listen.address!r} without TLS: whoever reaches this port reads every request and may send "
        "any. Give --tls-cert, --tls-key and --tls-client-ca, or let nothing but a gateway reach it (docs/security.md)"
    )


def _is_loopback(address: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def hide_key(pid: int, plan: LaunchPlan) -> None:
    """Overwrites the key of the closed protocols in a running server's command line, which every local user may read.

    Triton has copied it by then. A server is our child, so that we may write its memory; where the kernel or a
    container says no, that is told on standard error.
    """
    keys = [match[1] for match in map(_KEY.search, plan.command) if match]
    if not _overwritten(pid, keys):
        print(_KEY_SHOWS, file=sys.stderr, flush=True)


def _overwritten(pid: int, keys: list[str]) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        begin, end = int(fields[_ARGUMENTS_BEGIN]), int(fields[_ARGUMENTS_END])
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            for key in keys:
                memory.seek(begin)
                at = memory.read(end - begin).find(key.encode())
                if at < 0:
                    return False
                memory.seek(begin + at)
                memory.write(b"x" * len(key))
    except (OSError, IndexError, ValueError):
        return False
    return True


def refresh_text(line: str) -> str | None:
    """For people: what an event says of a refresh; None of other events, or of what is not one."""
    try:
        event = json.loads(line)
        if event["event"] != "refresh":
            return None
        who, version, refused = event["source"], event["version"], event.get("refused")
        return f"refresh {version} " + (f"taken by {who}" if refused is None else f"REFUSED by {who}: {refused}")
    except (ValueError, KeyError, TypeError):
        return None


class Reporter:
    """Tells of a server's life: as events, and on standard output as text or as those events.

    The models write events of their own. Of these, people are shown the refreshes, unless ``only_own``.
    """

    def __init__(self, run: Path, log_format: str, *, only_own: bool = False) -> None:
        self._events = Events(run, "serve")
        self._for_people, self._only_own = log_format != "json", only_own
        self._follower = EventFollower(run, self._hand_on)

    def _hand_on(self, line: str) -> None:
        text = refresh_text(line) if self._for_people else line
        if text is not None and not (self._for_people and self._only_own):
            print(text, flush=True)

    def event(self, name: str, **facts: object) -> None:
        """Writes an event of ``serve`` itself."""
        self._events.write(name, **facts)

    def text(self, text: str) -> None:
        """For people: nothing under ``--log-format json``."""
        if self._for_people:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """On standard error, and as an event."""
        print(text, file=sys.stderr, flush=True)
        self.event("warning", message=text)

    def close(self) -> None:
        """After the last event."""
        self._follower.stop()
