"""Versions of a tables folder side by side, and the one in use.

    item_tables/
      CURRENT        one line: the name of the version in use
      v000001/       tables folders (``table_format.py``)
      v000002/

``CURRENT`` is replaced in one step after the version's bytes have reached the disk, so that a reader finds the old
version or the new one, whole, even after a power cut.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import MANIFEST_NAME
from hstu_trt.contract.stored_table import is_table_name
from hstu_trt.contract.table_format import read_tables_folder

CURRENT_NAME = "CURRENT"
PUBLISH = "hstu-trt tables publish {folder}"
_MAX_NAME_BYTES = 255


def current_tables(folder: Path) -> Path:
    """The version in use of a folder of versions; a tables folder itself is returned as it is.

    Raises ArtefactError if ``CURRENT`` names no folder beside it.
    """
    current = folder / CURRENT_NAME
    if (folder / MANIFEST_NAME).exists() or not current.exists():
        return folder
    try:
        with current.open("rb") as stream:
            name = stream.read(_MAX_NAME_BYTES + 2).decode().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{current} is not readable ({error})") from None
    remedy = f"name a version with: {PUBLISH.format(folder=folder / 'VERSION')}"
    if not is_table_name(name) or len(name) > _MAX_NAME_BYTES:
        raise ArtefactError(f"{current} holds {name[:80]!r}, which is no name of a version; {remedy}")
    version = folder / name
    if not version.is_dir() or version.is_symlink():
        raise ArtefactError(f"{current} names {name!r}, and {version} is no folder; {remedy}")
    return version


def publish_version(version: Path, *, regenerate: str) -> None:
    """Makes a tables folder the version in use of the folder it stands in; also the way back to an older one.

    Hashes every shard first. Raises ArtefactError, and then leaves everything as it was.
    """
    version = version.absolute()
    if (version.parent / MANIFEST_NAME).exists():
        raise ArtefactError(f"{version.parent} is a folder of its own ({MANIFEST_NAME}), and cannot hold versions")
    if not is_table_name(version.name):
        raise ArtefactError(f"{version}: a version's name consists of letters, digits, '_', '.' and '-'")
    tables = read_tables_folder(version, regenerate=regenerate, verify=True)
    if tables.version not in (None, version.name):
        raise ArtefactError(f"{version} holds version {tables.version!r}; rename it back, or make it again")
    _sync(version / file for file in (*tables.files, MANIFEST_NAME))
    _sync({(version / file).parent for file in tables.files} | {version, version.parent})
    part = version.parent / f".{CURRENT_NAME}.{os.getpid()}"
    part.write_text(f"{version.name}\n")
    _sync([part])
    os.replace(part, version.parent / CURRENT_NAME)
    _sync([version.parent])


def _sync(paths: Iterable[Path]) -> None:
    """Waits until files, or the names in folders, have reached the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
