"""Opening the next version of tables beside the one that is served: side by side where two fit, else as an overlay.

A version is a tables folder, or a delta that leads on from one (``contract/table_versions.py``). It is opened, each of
its files hashed, and its first rows read while the old one serves; only then is it swapped in (``live.py``). Whatever
is wrong with it raises, and the old one goes on.

What decides between the two forms, by ``RefreshOptions.mode``:

    auto      side by side if the memory that the new version takes, beside what is held, is within the budget;
              else an overlay of the rows that changed
    swap      side by side, or refused
    overlay   an overlay of the rows that changed, whatever the budget

Tables that are mapped, not read, take no memory, so two always fit. A delta is laid over the whole version that it
leads on from, which is the one already open or stands beside it. Going back from an overlay to its base opens nothing.
Publishing the whole version that an overlay leads to folds the overlay into the rows in memory, which makes room for
the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.shards import map_vector
from hstu_trt.contract.stored_table import TablesFolder
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import DELTA_KIND, version_kind
from hstu_trt.contract.text import bytes_text
from hstu_trt.tables.delta import DeltaFolder, changed_rows, check_compatible, read_delta, tables_digest
from hstu_trt.tables.delta_chain import chain_to, chain_to_whole
from hstu_trt.tables.host import REGENERATE, HostTables, LookupOptions
from hstu_trt.tables.memory import available_memory
from hstu_trt.tables.overlay import Overlay, can_fold, fold, overlaid_tables
from hstu_trt.tables.row_source import OpenTables, RowSource
from hstu_trt.tables.table_arrays import PERMUTATION_TENSOR, open_arrays
from hstu_trt.tables.version import SharedRows, TableVersion

RefreshMode = Literal["auto", "swap", "overlay"]
REFRESH_MODES: tuple[RefreshMode, ...] = get_args(RefreshMode)
_WARM_ROWS = 4096
_SHARE_OF_FREE_MEMORY = 0.8
OVERLAY_SHARE = 0.1
"""Most bytes of an overlay, as a share of the tables' bytes: every lookup searches it first."""
_HALF_FOLDED = ""
"""The digest of no version."""


class NoRoomError(ArtefactError):
    """The machine lacks the memory for a version now; it may have it later."""


@dataclass(frozen=True, kw_only=True)
class RefreshOptions:
    """In which form versions are opened, and in how much memory."""

    mode: RefreshMode = "auto"
    memory_budget: int | None = None
    """Most bytes of rows in memory over all versions; None: what is held, and this process's part of 80 % of what the
    machine, or the container, has left."""
    processes: int = 1
    """Processes that take the same version at the same moment, each into memory of its own."""


def no_memory(folder: TablesFolder) -> int:
    """What mapped tables take: the page cache, which gives way."""
    return 0


def lacks_nothing(table: str) -> bool:
    """The files of every table are there."""
    return False


def accept(folder: TablesFolder) -> None:
    """Takes any tables."""


@dataclass(frozen=True, kw_only=True)
class VersionOpener:
    """Opens versions for a server. One thread uses it at a time."""

    open_tables: OpenTables = HostTables.open
    memory_of: Callable[[TablesFolder], int] = no_memory
    """Bytes of memory that ``open_tables`` takes of its own."""
    may_lack: Callable[[str], bool] = lacks_nothing
    """Tells the tables whose files need not be there, since ``open_tables`` has their rows from elsewhere."""
    check: Callable[[TablesFolder], None] = accept
    """Raises ArtefactError for tables that the model cannot use."""
    options: RefreshOptions = RefreshOptions()

    def open(self, folder: Path, name: str, held: TableVersion | None = None) -> TableVersion:
        """Opens the version in ``folder`` beside ``held``. Raises ArtefactError, ConfigError or OSError."""
        if version_kind(folder) == DELTA_KIND:
            return self._open_delta(folder, name, held)
        digest = tables_digest(folder)
        if held is not None and digest == held.base.digest:
            found = read_tables_folder(folder, regenerate=REGENERATE.format(folder=folder), may_lack=self.may_lack)
            self.check(found)
            return _whole(name, found, held.base)
        found = self._read_whole(folder)
        if held is None or self._fits(found, held):
            return _whole(name, found, self._open_rows(found, digest))
        if held.digest == digest:
            return self._fold(found, name, held)
        return self._overlay_of_whole(found, name, digest, held)

    def _read_whole(self, folder: Path) -> TablesFolder:
        regenerate = REGENERATE.format(folder=folder)
        found = read_tables_folder(folder, regenerate=regenerate, verify=True, may_lack=self.may_lack)
        self.check(found)
        return found

    def _open_rows(self, found: TablesFolder, digest: str) -> SharedRows:
        rows = self.open_tables(found.path)
        _warm(rows)
        return SharedRows(rows, digest, self.memory_of(found))

    def _fits(self, found: TablesFolder, held: TableVersion) -> bool:
        """Whether the two stand side by side. Raises ArtefactError where only that is wanted and they do not."""
        if self.options.mode == "overlay":
            return False
        needed, left = self.memory_of(found), self._memory_left(held)
        if needed <= left or self.options.mode == "auto":
            return needed <= left
        raise self._no_room(
            f"{found.path} takes {bytes_text(needed)} beside the version in use, and {bytes_text(left)} of the memory "
            f"budget are left; publish what changed: hstu-trt tables delta make OLD {found.path} --out DELTA"
        )

    def _no_room(self, message: str) -> ArtefactError:
        """A budget that is given stays as it is; what the machine has left does not."""
        return ArtefactError(message) if self.options.memory_budget is not None else NoRoomError(message)

    def _memory_left(self, held: TableVersion | None) -> int:
        if self.options.memory_budget is None:
            return int(_SHARE_OF_FREE_MEMORY * available_memory() / self.options.processes)
        return max(0, self.options.memory_budget - (0 if held is None else held.memory_bytes))

    def _fold(self, found: TablesFolder, name: str, held: TableVersion) -> TableVersion:
        """The rows of the overlay in use, in place of the base's: from now on the base is this version.

        Safe while requests read: they ask the overlay first, so none sees a row that is being written; and no version
        without this overlay may be left on the base, nor on what the base was before an earlier fold. Where that is
        not so, the overlay stays.
        """
        base = held.base
        assert isinstance(base.rows, HostTables)
        if base.holders > 1 or not can_fold(base.rows, held.overlays):
            return self._laid_over(base, found, dict(held.overlays), name, held.digest, held.memory_bytes)
        # From the first row on, the base's rows are no longer those of its digest: nobody may go back to them. Should
        # writing fail, they are nobody's, and served under the overlay only, until the same fold is tried again.
        base.digest = _HALF_FOLDED
        fold(base.rows, held.overlays)
        rows = base.rows.with_gathers(found, base.rows.gathers)
        base.digest = held.digest
        return _whole(name, found, SharedRows(rows, held.digest, base.memory, earlier=base))

    def _overlay_of_whole(self, found: TablesFolder, name: str, digest: str, held: TableVersion) -> TableVersion:
        base = held.base.rows.folder
        if held.base.digest == _HALF_FOLDED:
            raise ArtefactError(
                f"the rows beneath {held.name} are half written over; publish its whole version again, or restart"
            )
        if tables_digest(base.path) != held.base.digest:
            raise ArtefactError(f"{base.path}, on which {held.name} stands, has been replaced; restart the server")
        check_compatible(base, found)
        most, overlays = min(self._memory_left(held), self._most_bytes(found)), {}
        for table, stored in found.tables.items():
            before, after = open_arrays(base.path, base.tables[table]), open_arrays(found.path, stored)
            overlays[table] = Overlay.of(stored, changed_rows(before, after, most))
        return self._laid_over(held.base, found, overlays, name, digest, most)

    def _open_delta(self, folder: Path, name: str, held: TableVersion | None) -> TableVersion:
        """Over the rows that are open already, where deltas lead there; else over the nearest whole version."""
        chain = None if held is None else chain_to(held.base.digest, read_delta(folder))
        if held is not None and chain is not None:
            return self._apply(held.base, chain, name, self._memory_left(held))
        whole, chain = chain_to_whole(read_delta(folder))
        found = self._read_whole(whole)
        left = self._memory_left(held)
        if held is not None and self.memory_of(found) > left:
            raise self._no_room(
                f"{folder} leads on from {whole}, which does not fit beside the version in use; "
                "publish a delta that leads on from that one"
            )
        base = self._open_rows(found, chain[0].base)
        base.hold()  # while the overlay is made
        try:
            return self._apply(base, chain, name, left - base.memory)
        finally:
            base.release()

    def _apply(self, base: SharedRows, chain: list[DeltaFolder], name: str, left: int) -> TableVersion:
        at, overlays = base.rows.folder, dict[str, Overlay]()
        for delta in chain:
            target = delta.target(at)
            overlays = {
                table: Overlay.of(stored, delta.changed(at.tables[table], stored), overlays.get(table))
                for table, stored in target.tables.items()
            }
            at = target
        self.check(at)
        return self._laid_over(base, at, overlays, name, chain[-1].digest, min(left, self._most_bytes(at)))

    def _most_bytes(self, found: TablesFolder) -> int:
        return int(OVERLAY_SHARE * _payload(found))

    def _laid_over(
        self, base: SharedRows, found: TablesFolder, overlays: dict[str, Overlay], name: str, digest: str, most: int
    ) -> TableVersion:
        if not isinstance(base.rows, HostTables):
            raise ArtefactError(f"{found.path} changes single rows; the tier of these tables takes whole versions only")
        size = sum(overlay.nbytes for overlay in overlays.values())
        if size > most:
            raise self._no_room(
                f"{found.path} lays {bytes_text(size)} over {base.rows.folder.path.name}, and {bytes_text(most)} are "
                "allowed; publish the whole version"
            )
        laid = {table: overlay for table, overlay in overlays.items() if len(overlay.numbers)}
        rows = overlaid_tables(base.rows, found, laid, _permutations(base.rows.folder))
        return TableVersion(name=name, digest=digest, folder=found, rows=rows, base=base, overlays=laid)


def _whole(name: str, folder: TablesFolder, base: SharedRows) -> TableVersion:
    return TableVersion(name=name, digest=base.digest, folder=folder, rows=base.rows, base=base)


def _permutations(folder: TablesFolder) -> dict[str, NDArray]:
    return {
        name: map_vector(folder.path / table.ids.row_of_id, PERMUTATION_TENSOR, "uint32")
        for name, table in folder.tables.items()
        if table.ids.row_of_id is not None
    }


def _warm(rows: RowSource) -> None:
    """Reads the first rows of each table, which are the most popular ones where rows are ordered by rank."""
    for table in rows.folder.tables.values():
        ids = np.arange(min(table.rows, _WARM_ROWS), dtype=np.int64)[:, None]
        for feature in table.features[:1]:
            rows.lookup_features_with_status([feature], ids, LookupOptions(policy="zero"))


def _payload(folder: TablesFolder) -> int:
    return sum(table.payload_bytes for table in folder.tables.values())
