"""Versions of a tables folder side by side, and the one in use.

    item_tables/
      CURRENT        one line: the name of the version in use
      PREVIOUS       the one before it, for the way back
      v000001/       a tables folder (``table_format.py``)
      v000002/       a delta (``tables/delta.py``): the rows that differ from v000001
      v000003/       a model folder (``model_folder.py``): new dense weights and their tables, which move together

``CURRENT`` is replaced in one step after the version's bytes have reached the disk, so that a reader finds the old
version or the new one, whole, even after a power cut.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import MANIFEST_NAME, read_document, read_json, read_manifest, read_small_file
from hstu_trt.contract.model_folder import MODEL_KIND, TABLES_FOLDER, read_model_folder, require_whole
from hstu_trt.contract.stored_table import is_table_name
from hstu_trt.contract.table_format import TABLES_KIND, read_tables_folder

CURRENT_NAME = "CURRENT"
PREVIOUS_NAME = "PREVIOUS"
DELTA_KIND = "tables delta"
PUBLISH = "hstu-trt tables publish {folder}"
_MAX_NAME_BYTES = 255


def current_tables(folder: Path) -> Path:
    """The tables in use of a folder of versions; a tables folder itself is returned as it is.

    Raises ArtefactError if ``CURRENT`` names no folder beside it, or a delta.
    """
    if (folder / MANIFEST_NAME).exists() or not (folder / CURRENT_NAME).exists():
        return folder
    version = named_version(folder, CURRENT_NAME)
    if version_kind(version) == DELTA_KIND:
        raise ArtefactError(
            f"{folder / CURRENT_NAME} names {version.name!r}, a delta, which only a server lays over its base; "
            f"make the whole version with: hstu-trt tables delta apply BASE {version} --out OUT"
        )
    return tables_in(version)


def named_version(folder: Path, name_file: str) -> Path:
    """The version that ``CURRENT`` or ``PREVIOUS`` names. Raises ArtefactError unless it is a folder beside it."""
    current = folder / name_file
    try:
        name = read_small_file(current, _MAX_NAME_BYTES + 1).decode().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{current} is not readable ({error})") from None
    remedy = f"name a version with: {PUBLISH.format(folder=folder / 'VERSION')}"
    if not is_table_name(name) or len(name) > _MAX_NAME_BYTES:
        raise ArtefactError(f"{current} holds {name[:80]!r}, which is no name of a version; {remedy}")
    version = folder / name
    if not version.is_dir() or version.is_symlink():
        raise ArtefactError(f"{current} names {name!r}, and {version} is no folder; {remedy}")
    return version


def version_kind(version: Path) -> str:
    """What a version is: TABLES_KIND, DELTA_KIND or MODEL_KIND. Raises ArtefactError."""
    try:
        kind = read_json(version / MANIFEST_NAME)["kind"]
    except FileNotFoundError:
        why = "there is none" if version.is_dir() else f"there is no folder {version}"
        raise ArtefactError(f"{version / MANIFEST_NAME} is not readable: {why}") from None
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise ArtefactError(f"{version / MANIFEST_NAME} is not readable ({type(error).__name__}: {error})") from None
    if kind not in (TABLES_KIND, DELTA_KIND, MODEL_KIND):
        raise ArtefactError(f"{version} holds {kind!r}; a version is a tables folder, a delta or a model folder")
    return str(kind)


def tables_in(version: Path) -> Path:
    """The tables folder of a version that is no delta. Raises ArtefactError."""
    if version_kind(version) != MODEL_KIND:
        return version
    tables = version / TABLES_FOLDER
    if tables.is_symlink():
        raise ArtefactError(f"{tables} is a link; a version holds its tables itself")
    return tables


def publish_version(version: Path, *, regenerate: str) -> None:
    """Makes a version the one in use of the folder it stands in; also the way back to an older one.

    Hashes every file first. Raises ArtefactError, and then leaves everything as it was.
    """
    version = version.absolute()
    if (version.parent / MANIFEST_NAME).exists():
        raise ArtefactError(f"{version.parent} is a folder of its own ({MANIFEST_NAME}), and cannot hold versions")
    if not is_table_name(version.name):
        raise ArtefactError(f"{version}: a version's name consists of letters, digits, '_', '.' and '-'")
    if version.is_symlink():
        raise ArtefactError(f"{version} is a link; a version is a folder")
    files = _verified_files(version, regenerate)
    _sync(version / file for file in (*files, MANIFEST_NAME))
    _sync({(version / file).parent for file in files} | {version, version.parent})
    before = _version_in_use(version.parent)
    if before is not None and before != version:
        _name(version.parent, PREVIOUS_NAME, before.name)
    _name(version.parent, CURRENT_NAME, version.name)


def rollback_version(folder: Path, *, regenerate: str) -> Path:
    """Publishes the version that was in use before the one in use. Raises ArtefactError where there is none."""
    remedy = f"name a version with: {PUBLISH.format(folder=folder / 'VERSION')}"
    if not (folder / PREVIOUS_NAME).exists():
        raise ArtefactError(f"{folder} has no {PREVIOUS_NAME}; {remedy}")
    previous = named_version(folder, PREVIOUS_NAME)
    if previous == _version_in_use(folder):
        raise ArtefactError(f"{previous.name!r} is in use already; {remedy}")
    publish_version(previous, regenerate=regenerate)
    return previous


def _version_in_use(folder: Path) -> Path | None:
    """None also where ``CURRENT`` names no version: publishing a sound one must mend that."""
    try:
        return named_version(folder, CURRENT_NAME)
    except ArtefactError:
        return None


def _verified_files(version: Path, regenerate: str) -> list[str]:
    """The files of a version whose sha256 has been checked, relative to it."""
    kind = version_kind(version)
    if kind == DELTA_KIND:
        return list(read_manifest(version, kind=DELTA_KIND, regenerate=regenerate)["files"])
    if kind == MODEL_KIND:
        model = read_model_folder(version)
        require_whole(model)
        inner = read_tables_folder(model.tables, regenerate=regenerate, verify=True)
        own = read_document(version, kind=MODEL_KIND, regenerate=regenerate)["files"]
        return [*own, *(f"{TABLES_FOLDER}/{file}" for file in inner.files)]
    tables = read_tables_folder(version, regenerate=regenerate, verify=True)
    if tables.version not in (None, version.name):
        raise ArtefactError(f"{version} holds version {tables.version!r}; rename it back, or make it again")
    return list(tables.files)


def _name(folder: Path, name_file: str, name: str) -> None:
    part = folder / f".{name_file}.{os.getpid()}"
    part.write_text(f"{name}\n")
    _sync([part])
    os.replace(part, folder / name_file)
    _sync([folder])


def _sync(paths: Iterable[Path]) -> None:
    """Waits until files, or the names in folders, have reached the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
