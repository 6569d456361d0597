"""Seeded damage: to bytes anywhere, to JSON by what a reader might trip over, and to members of zip archives."""

from __future__ import annotations

import io
import json
import random
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

_HOSTILE = (
    None, True, False, -1, 0, 1, 2**31, 2**53, 2**63, 2**64, -(2**70), 1.5, float("nan"), float("inf"), 1e308, "", "..",
    "../up", "/etc/hostname", "a\0b", "float16", "int8", "F32", "permutation", "splitmix64", "x" * 300, "é\ud800", [],
    {}, [[]], [0], {"": None}, {"kind": "none"}, "items/00000.safetensors", "v1",
    [["items/00000.safetensors", 0, 4, 4096]],
)  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A damaged copy: of JSON, half of the time in its structure; of a zip archive, in a member."""
    if content[:4] == b"PK\3\4" and rng.random() < 0.7:
        try:
            return mutate_zip(content, rng)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, zlib.error):
            return mutate_bytes(content, rng)  # damaged before
    if rng.random() < 0.5:
        try:
            document = json.loads(content)
        except ValueError:
            return mutate_bytes(content, rng)
        for _ in range(rng.randint(1, 3)):
            document = mutate_json(document, rng)
        return json.dumps(document).encode("utf-8", "surrogatepass")
    return mutate_bytes(content, rng)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut off, doubled, moved or put in."""
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        # Headers stand at the beginning, and are where it hurts.
        end = len(damaged) if rng.random() < 0.5 else min(len(damaged), rng.choice((40, 200, 2000)))
        at, length = rng.randint(0, end), rng.randint(1, 12)
        kind = rng.randrange(6)
        if kind == 0:
            damaged[at : at + length] = rng.randbytes(length)
        elif kind == 1:
            del damaged[at : at + length]
        elif kind == 2:
            damaged[at:at] = damaged[at : at + length]
        elif kind == 3:
            del damaged[at:]
        elif kind == 4:
            damaged[at:at] = rng.choice((b"\0", b"\xff" * 8, b"[" * 40, b'"', b"1e999", b"-1", b"999999999999"))
        elif at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def mutate_zip(content: bytes, rng: random.Random) -> bytes:
    """One member damaged, renamed, left out, or blown up and compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        members = old.infolist()
        # The pickle is where it hurts: half of the time it is the one.
        pickles = [number for number, info in enumerate(members) if info.filename.endswith((".pkl", ".npy"))]
        chosen = rng.choice(pickles) if pickles and rng.random() < 0.5 else rng.randrange(len(members))
        kind = rng.randrange(8)
        for number, info in enumerate(members):
            data, name, how = old.read(info), info.filename, zipfile.ZIP_STORED
            if number == chosen and kind == 0:
                continue
            if number == chosen and kind == 1:
                name = rng.choice(("", "/data.pkl", "../x", "data.pkl", "archive/data/0", "x" * 300))
            elif number == chosen and kind == 2:
                data, how = data + bytes(8 << 20), zipfile.ZIP_DEFLATED
            elif number == chosen:
                data = mutate_bytes(data, rng)
            new.writestr(zipfile.ZipInfo(name or "x"), data, compress_type=how)
    return out.getvalue()


def mutate_json(document: Any, rng: random.Random) -> Any:
    """One value replaced, removed, renamed or doubled, at any depth."""
    places = list(_places(document))
    path = rng.choice(places)
    if not path:
        return rng.choice(_HOSTILE)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    key, kind = path[-1], rng.randrange(4)
    if kind == 0:
        inner[key] = rng.choice(_HOSTILE)
    elif kind == 1:
        del inner[key]
    elif kind == 2 and isinstance(inner, dict):
        inner[rng.choice(("", "x", "rows", f"{key}_"))] = inner.pop(key)
    elif isinstance(inner, list):
        inner.insert(rng.randint(0, len(inner)), inner[key])
    else:
        other = document
        for step in rng.choice(places):
            other = other[step]
        inner[key] = json.loads(json.dumps(other))
    return document


def _places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from _places(value, (*at, key))
