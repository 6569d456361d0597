"""Where processes listen, as the kernel tells it."""

import os
import re
import socket
import struct
from contextlib import suppress
from pathlib import Path


def listening(pids):
    """{(IPv4 address, port)} that any of the processes listens on; of IPv6 the part that holds an address of IPv4.

    Processes may end, and close what they had open, while they are read.
    """
    inodes = {inode for pid in pids for inode in _sockets_of(pid)}
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {_place(row[1]) for row in rows if row[3] == "0A" and row[9] in inodes}


def _sockets_of(pid):
    with suppress(OSError):
        for handle in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                yield from re.findall(r"socket:\[(\d+)\]", os.readlink(f"/proc/{pid}/fd/{handle}"))


def _place(text):
    """From the kernel's notation, 0100007F:1F41 say."""
    address, _, port = text.partition(":")
    return socket.inet_ntoa(struct.pack("<I", int(address[-8:], 16))), int(port, 16)
