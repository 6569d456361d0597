"""A server that speaks RESP as a test wants it to: what no real node would answer."""

import socket
import threading


class FakeNode:
    """Serves all slots of a cluster of one; ``answer(parts) -> bytes`` makes the reply to HMGET and HSET.

    None as an answer, or in a list of pieces, closes the connection; a list is sent piece by piece.
    """

    def __init__(self, answer):
        self.answer = answer
        self.seen = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ended = False
        self._streams = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ended = True
        for stream in (self._listener, *self._streams):
            stream.close()

    @property
    def name(self):
        return f"127.0.0.1:{self.port}"

    def slots(self):
        """The reply to CLUSTER SLOTS; the host is left empty, as by a node that does not know its name."""
        return b"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$0\r\n\r\n:%d\r\n$1\r\nx\r\n" % self.port

    def _accept(self):
        while not self._ended:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            self._streams.append(stream)
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with stream, stream.makefile("rb") as lines:
                while (parts := read_command(lines)) is not None:
                    reply = self._reply(parts)
                    if reply is None:
                        return
                    for part in reply if isinstance(reply, list) else [reply]:
                        if part is None:
                            return
                        stream.sendall(part)
        except (OSError, ValueError):
            return

    def _reply(self, parts):
        if parts[0] == b"CLUSTER":
            return self.slots()
        if parts[0] in (b"READONLY", b"ASKING", b"AUTH"):
            return b"+OK\r\n"
        self.seen.append(parts)
        return self.answer(parts)


def read_command(lines):
    """The parts of the next command, or None at the end."""
    header = lines.readline()
    if not header:
        return None
    parts = []
    for _ in range(int(header[1:])):
        size = int(lines.readline()[1:])
        parts.append(lines.read(size))
        lines.read(2)
    return parts


def bulks(values):
    """An array of bulk strings; None is nil."""
    body = b"".join(b"$-1\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value) for value in values)
    return b"*%d\r\n%s" % (len(values), body)
