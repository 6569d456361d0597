"""An open version of tables: the rows of a tables folder, or an overlay over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hstu_trt.contract.stored_table import TablesFolder
from hstu_trt.tables.overlay import Overlay
from hstu_trt.tables.row_source import RowSource


class SharedRows:
    """The rows of a whole version, held by it and by the overlays on it; closed with the last of them.

    earlier: what the same arrays were before they were written over; its holders still read them.
    """

    def __init__(self, rows: RowSource, digest: str, memory: int, earlier: SharedRows | None = None) -> None:
        self.rows, self.digest, self.memory = rows, digest, memory
        self._holders, self._earlier = 0, earlier

    @property
    def holders(self) -> int:
        """Versions that read these arrays, those from before they were written over among them."""
        if self._earlier is not None and not self._earlier.holders:
            self._earlier = None
        return self._holders + (0 if self._earlier is None else self._earlier.holders)

    def hold(self) -> None:
        self._holders += 1

    def release(self) -> None:
        """Closes the rows once nobody holds them."""
        self._holders -= 1
        if self._holders <= 0:
            self.rows.close()


@dataclass(eq=False, kw_only=True)
class TableVersion:
    """Opened and closed by one thread, read by any."""

    name: str
    digest: str
    """``tables_digest``: what it answers."""
    folder: TablesFolder
    """What its manifest says; the base's may say otherwise."""
    rows: RowSource
    base: SharedRows
    overlays: Mapping[str, Overlay] = field(default_factory=dict)
    """By table; empty for a whole version."""

    def __post_init__(self) -> None:
        self.base.hold()

    @property
    def label(self) -> str:
        """As responses name it, for example ``v000002@1f0c5a9be21d``."""
        return version_label(self.name, self.digest)

    @property
    def memory_bytes(self) -> int:
        """Bytes of rows in memory, of the base and the overlays."""
        return self.base.memory + sum(overlay.nbytes for overlay in self.overlays.values())

    def close(self) -> None:
        """Lets go of the rows; those of the base go with the last version on it."""
        if self.rows is not self.base.rows:
            self.rows.close()
        self.overlays = {}
        self.base.release()


def version_label(name: str, digest: str) -> str:
    """A name may come again with other rows, a digest not."""
    return f"{name}@{digest[:12]}"
