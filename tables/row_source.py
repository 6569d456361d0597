"""The one interface behind which rows come from: memory, a file, another machine, an overlay over any of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from numpy.typing import NDArray

from hstu_trt.contract.stored_table import TablesFolder
from hstu_trt.tables.host import LookupOptions


class RowSource(Protocol):
    """The tables of one version, open for lookups; never another version's rows. Threads may share it."""

    folder: TablesFolder
    """What its manifest says."""
    bad_ids: Counter[str]
    """Ids outside each table so far."""

    def lookup_features_with_status(
        self, features: Sequence[str], ids: NDArray, options: LookupOptions
    ) -> tuple[NDArray, NDArray]:
        """Ids ``[n, features]`` -> rows ``[n, sum of the tables' dims]`` and status ``[n, features]`` uint8.

        Raises InputError for an id that the policy rejects, RemoteError for rows that a cluster must give and does not.
        """
        ...

    def close(self) -> None:
        """Gives the memory back."""
        ...


OpenTables = Callable[[Path], RowSource]
"""Opens the tables folder of one version. Raises ArtefactError or ConfigError, and RemoteError for a cluster."""
