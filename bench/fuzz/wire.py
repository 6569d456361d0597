"""Connections that are no gRPC, or only begin as such: noise, lies of HTTP/2, half-open and slow ones."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 5, 6, 7, 8, 9
IDLE, SLOW = 40, 10
"""Connections that are held open for the whole run: silent, and sending a byte at a time."""
_ANSWER_S, _PAUSE_S = 0.2, 0.05
_DEEP_JSON = b'{"inputs":' + b"[" * 200_000
_KILLERS_OF_HTTP = {
    "deep JSON": b"POST /v2/models/ranking/infer HTTP/1.1\r\nContent-Length: 400000\r\n\r\n" + _DEEP_JSON,
    "huge shape in JSON": b"POST /v2/models/ranking/infer HTTP/1.1\r\nContent-Length: 110\r\n\r\n"
    b'{"inputs":[{"name":"uih_ids","shape":[9223372036854775807,2],"datatype":"INT64","data":[1]}]}',
    "large body": b"POST /v2/models/ranking/infer HTTP/1.1\r\nContent-Length: 314572800\r\n\r\n" + bytes(1 << 20),
}


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """A frame of HTTP/2, whose length may be a lie."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size & 0xFFFFFF)[1:] + struct.pack(">BBI", kind, flags, stream & 0xFFFFFFFF) + payload


def _open(frames: bytes) -> bytes:
    return PREFACE + frame(SETTINGS, 0, 0) + frames


# Indexed and literal fields of HPACK (RFC 7541): POST, http, the path of ModelInfer, application/grpc.
_CALL = b"\x83\x86\x04\x2a" + b"/inference.GRPCInferenceService/ModelInfer" + b"\x0f\x10\x10application/grpc"


def _random_frames(chance: random.Random) -> bytes:
    frames = b""
    for _ in range(chance.randrange(1, 30)):
        length = chance.choice((None, None, None, 0, 1, 0xFFFFFF))
        payload = chance.randbytes(chance.choice((0, 4, 8, 30, 300)))
        frames += frame(
            chance.randrange(12), chance.randrange(256), chance.choice((0, 1, 2, 3, 2**31 - 1)), payload, length
        )
    return _open(frames)


def _call_and(tail: Callable[[random.Random], bytes]) -> Callable[[random.Random], bytes]:
    return lambda chance: _open(frame(HEADERS, 4, 1, _CALL) + tail(chance))


def _always(data: bytes) -> Callable[[random.Random], bytes]:
    return lambda chance: data


ATTACKS: dict[str, Callable[[random.Random], bytes]] = {
    "noise": lambda chance: chance.randbytes(chance.choice((1, 24, 1000, 60_000))),
    "TLS hello": lambda chance: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(400),
    "HTTP/1.1": lambda chance: b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n",
    **{what: _always(body) for what, body in _KILLERS_OF_HTTP.items()},
    "random frames": _random_frames,
    "half a preface": lambda chance: PREFACE[: chance.randrange(len(PREFACE))],
    "settings without end": lambda chance: PREFACE + frame(SETTINGS, 0, 0) * 3000,
    "lying settings": lambda chance: PREFACE + frame(SETTINGS, 0, 0, chance.randbytes(6 * 20)),
    "pings without end": lambda chance: _open(frame(PING, 0, 0, bytes(8)) * 3000),
    "reset at once, 2000 times": lambda chance: _open(
        b"".join(frame(HEADERS, 5, 2 * n + 1, _CALL) + frame(RST, 0, 2 * n + 1, bytes(4)) for n in range(2000))
    ),
    "headers without end": lambda chance: _open(
        frame(HEADERS, 0, 1, _CALL) + frame(CONTINUATION, 0, 1, b"\x00\x01a\x7f\x00" + bytes(100)) * 500
    ),
    "broken headers": lambda chance: _open(frame(HEADERS, 4, 1, chance.randbytes(chance.choice((1, 20, 2000))))),
    "window overflow": lambda chance: _open(frame(WINDOW, 0, 0, b"\x7f\xff\xff\xff") * 4),
    "message cut short": _call_and(lambda chance: frame(DATA, 1, 1, b"\x00\x00\x00\x10\x00" + bytes(100))),
    "4 GiB, says the head": _call_and(lambda chance: frame(DATA, 0, 1, b"\x00\xff\xff\xff\xff" + bytes(999))),
    "compressed, says the head": _call_and(
        lambda chance: frame(DATA, 1, 1, b"\x01\x00\x00\x00\x20" + chance.randbytes(32))
    ),
    "data before a call": lambda chance: _open(frame(DATA, 0, 1, chance.randbytes(500)) * 10),
    "goodbye first": lambda chance: _open(frame(GOAWAY, 0, 0, bytes(8)) + frame(HEADERS, 5, 1, _CALL)),
}


class WireAttack(threading.Thread):
    """Attacks one after another until it is stopped, while silent and slow connections stay open. A context manager."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(name="wire", daemon=True)
        host, _, port = url.rpartition(":")
        self._address, self._seed = (host, int(port)), seed
        self._ended = threading.Event()
        self.counts: Counter[str] = Counter()
        """Connections by attack."""
        self.refused: Counter[str] = Counter()
        """Those that the server did not even accept."""

    def __enter__(self) -> WireAttack:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        """The thread."""
        with contextlib.ExitStack() as held:
            idle = [held.enter_context(self._connect(b"" if n % 2 else PREFACE)) for n in range(IDLE)]
            slow = [held.enter_context(self._connect(b"")) for _ in range(SLOW)]
            dripped = _open(frame(HEADERS, 4, 1, _CALL) + frame(DATA, 0, 1, b"\x00\x00\x01\x00\x00"))
            self.counts.update({"silent": len(idle), "a byte at a time": len(slow)})
            turn = 0
            while not self._ended.wait(_PAUSE_S):
                for drop in slow:
                    with contextlib.suppress(OSError):
                        drop.send(dripped[turn % len(dripped) :][:1])
                self._attack(turn)
                turn += 1

    def _connect(self, first: bytes) -> socket.socket:
        connection = socket.create_connection(self._address, timeout=5)
        with contextlib.suppress(OSError):
            connection.sendall(first)
        return connection

    def _attack(self, turn: int) -> None:
        names = list(ATTACKS)
        name = names[turn % len(names)]
        data = ATTACKS[name](random.Random(f"{self._seed} {turn}"))
        try:
            connection = socket.create_connection(self._address, timeout=5)
        except OSError:
            self.refused[name] += 1
            return
        self.counts[name] += 1
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_ANSWER_S)
            connection.sendall(data)
            until = time.monotonic() + _ANSWER_S
            while connection.recv(65536) and time.monotonic() < until:
                pass
