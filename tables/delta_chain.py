"""Which deltas lead from a whole version to a published one, among the versions that stand beside each other."""

from __future__ import annotations

from pathlib import Path

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.stored_table import is_table_name
from hstu_trt.contract.table_versions import DELTA_KIND, tables_in, version_kind
from hstu_trt.tables.delta import DeltaFolder, read_delta, tables_digest


def chain_to(digest: str, last: DeltaFolder) -> list[DeltaFolder] | None:
    """The deltas from the version of that digest to ``last``, the oldest first; None where they do not lead there."""
    chain = [last]
    while chain[0].base != digest:
        beneath = _delta_to(chain[0])
        if beneath is None or beneath in [delta.path for delta in chain]:
            return None
        chain.insert(0, read_delta(beneath))
    return chain


def chain_to_whole(last: DeltaFolder) -> tuple[Path, list[DeltaFolder]]:
    """The nearest whole version beneath a delta, and the deltas from it to ``last``. Raises ArtefactError."""
    chain = [last]
    while (whole := _whole_of(chain[0])) is None:
        beneath = _delta_to(chain[0])
        if beneath is None or beneath in [delta.path for delta in chain]:
            raise ArtefactError(
                f"{chain[0].path} leads on from version {chain[0].base_version!r} ({chain[0].base[:12]}), "
                "and no whole version beside it is that one or leads there"
            )
        chain.insert(0, read_delta(beneath))
    return whole, chain


def _versions(folder: Path) -> list[tuple[Path, str]]:
    """Folders that look like versions, with their kinds."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and is_table_name(path.name):
            try:
                found.append((path, version_kind(path)))
            except ArtefactError:
                continue
    return found


def _whole_of(delta: DeltaFolder) -> Path | None:
    """The tables folder that a delta leads on from."""
    for path, kind in _versions(delta.path.parent):
        try:
            if kind != DELTA_KIND and tables_digest(tables_in(path)) == delta.base:
                return tables_in(path)
        except ArtefactError:
            continue  # what is unsound is no base
    return None


def _delta_to(delta: DeltaFolder) -> Path | None:
    """The delta that leads to where another leads on from."""
    for path, kind in _versions(delta.path.parent):
        try:
            if kind == DELTA_KIND and path != delta.path and read_delta(path, verify=False).digest == delta.base:
                return path
        except ArtefactError:
            continue
    return None
