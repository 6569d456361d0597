"""RESP2, the protocol of Redis and Valkey, as far as tools need it; rows travel through the C++ client."""

from __future__ import annotations

from typing import TypeAlias

from hstu_trt.contract.errors import HstuTrtError

Reply: TypeAlias = "bytes | str | int | list[Reply] | None"
"""A bulk string, a status, an integer, nil, or an array."""


class RemoteError(HstuTrtError):
    """A cluster cannot be reached, refuses a command, or lacks rows. Names the node or the table, and the cause."""

    exit_code = 1


class RowsOutOfReachError(RemoteError):
    """Rows that a request needs are not to be had."""

    def __init__(self, text: str, trouble: str) -> None:
        """text: which rows, for whoever asked. trouble: what went wrong at which node, for whoever runs the servers."""
        super().__init__(f"{text}; {trouble}" if trouble else text)
        self.text = text


class NotInClusterError(RemoteError):
    """The cluster answers, and holds no complete version with the rows of a folder."""


def decode(reply: bytes) -> Reply:
    """A whole reply. Raises RemoteError for one that is an error, or no RESP."""
    value, end = _value(reply, 0)
    if end != len(reply):
        raise RemoteError(f"a reply of {len(reply)} bytes ends after {end}")
    return value


def _value(reply: bytes, at: int) -> tuple[Reply, int]:
    line_end = reply.find(b"\r\n", at)
    if line_end < 0:
        raise RemoteError(f"a reply breaks off: {reply[at : at + 80]!r}")
    kind, text, after = reply[at : at + 1], reply[at + 1 : line_end], line_end + 2
    if kind == b"+":
        return text.decode(errors="replace"), after
    if kind == b"-":
        raise RemoteError(f"the node answered: {text.decode(errors='replace')}")
    if kind == b":":
        return int(text), after
    if kind == b"$":
        size = int(text)
        return (None, after) if size < 0 else (reply[after : after + size], after + size + 2)
    if kind != b"*":
        raise RemoteError(f"a reply begins with {kind!r}")
    items: list[Reply] = []
    for _ in range(int(text)):
        item, after = _value(reply, after)
        items.append(item)
    return items, after


def text_of(reply: Reply) -> str:
    """A reply that is text, as text; nil is ""."""
    if isinstance(reply, bytes):
        return reply.decode(errors="replace")
    return "" if reply is None else str(reply)
