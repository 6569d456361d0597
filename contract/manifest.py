"""Manifests: the slip of paper that travels with every folder of artefacts from room to room.

``manifest.json`` names what made the folder and holds the sha256 of each file. A reader refuses a folder that is
incomplete, damaged or from another contract, and names the command that makes it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError

MANIFEST_NAME = "manifest.json"
SCHEMA = 1
_CHUNK = 1 << 20
_MOST_BYTES = 64 << 20
"""Of a manifest: a hundred thousand shards."""


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, read in chunks; ``progress`` is told the bytes of each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


def read_small_file(path: Path, most_bytes: int = _MOST_BYTES) -> bytes:
    """The content of a regular file, or ``most_bytes`` + 1 bytes of a larger one. Raises OSError.

    Never waits, as opening a named pipe would: whoever watches a folder must not be held up by what lies there.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise OSError(f"{path} is no regular file")
        return stream.read(most_bytes + 1)


def read_json(path: Path) -> Any:
    """The content of a small JSON file. Raises OSError, ValueError or RecursionError."""
    content = read_small_file(path)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{path} has more than {_MOST_BYTES} bytes")
    return json.loads(content)


def json_digest(document: Any) -> str:
    """The sha256 of a JSON document, independent of key order and spacing."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a reader never sees half of it. Raises OSError, and leaves nothing then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_manifest(folder: Path, *, kind: str, made_by: str, files: Iterable[str], facts: Mapping[str, Any]) -> Path:
    """Writes ``folder/manifest.json``.

    kind: what the folder is, e.g. "onnx", "tables", "deployment".
    made_by: the command that makes the folder again.
    files: paths relative to the folder; each one's size and sha256 are recorded.
    facts: everything else a reader needs (config, precision, versions, digests of the inputs).
    """
    entries = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)} for name in sorted(files)
    }
    document = {"schema": SCHEMA, "kind": kind, "made_by": made_by, "files": entries, **facts}
    path = folder / MANIFEST_NAME
    write_text_atomically(path, json.dumps(document, indent=1) + "\n")
    return path


def read_manifest(
    folder: Path,
    *,
    kind: str,
    regenerate: str,
    verify: bool = True,
    may_lack: Callable[[str], bool] = lambda file: False,
) -> dict[str, Any]:
    """Reads and checks ``folder/manifest.json`` and the sizes of its files; ``verify`` also re-hashes every file.

    regenerate: the command to name when the folder is missing or wrong. may_lack: tells files that need not be there.
    Raises ArtefactError.
    """
    document, remedy = read_document(folder, kind=kind, regenerate=regenerate), f"make it again with: {regenerate}"
    try:
        for name, entry in document["files"].items():
            if not may_lack(name) or (folder / name).exists():
                _check_file(folder, name, entry, verify, remedy)
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise ArtefactError(f"{folder / MANIFEST_NAME}: its list of files is malformed ({error!r}); {remedy}") from None
    return document


def read_document(folder: Path, *, kind: str, regenerate: str) -> dict[str, Any]:
    """Reads ``folder/manifest.json`` and checks its kind, but not its files; see ``read_manifest``."""
    path, remedy = folder / MANIFEST_NAME, f"make it again with: {regenerate}"
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise ArtefactError(f"{folder} holds no {kind} ({MANIFEST_NAME} is missing); {remedy}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ArtefactError(f"{path} is not readable JSON ({error}); {remedy}") from None
    fields = document if isinstance(document, dict) else {"kind": type(document).__name__}
    if (fields.get("schema"), fields.get("kind")) != (SCHEMA, kind):
        schema = f" of schema {fields['schema']}" if fields.get("kind") == kind and "schema" in fields else ""
        raise ArtefactError(
            f"{path} describes {fields.get('kind')!r}{schema}, not {kind!r} of schema {SCHEMA}; {remedy}"
        )
    return document


def _check_file(folder: Path, name: str, entry: Mapping[str, Any], verify: bool, remedy: str) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ArtefactError(f"{folder / MANIFEST_NAME} names a file outside its folder: {name!r}")
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; {remedy}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtefactError(f"{path} has {size} bytes, its manifest says {entry['bytes']}; {remedy}")
    if verify and file_sha256(path) != entry["sha256"]:
        raise ArtefactError(f"{path} does not match the sha256 in its manifest; {remedy}")
