"""``tables verify``: hashes every file again, and reads what a hash cannot vouch for: scales and permutations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import file_sha256
from hstu_trt.contract.stored_table import StoredTable, TablesFolder
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.contract.text import bytes_text
from hstu_trt.tables.host import REGENERATE
from hstu_trt.tables.table_arrays import TableArrays, open_arrays
from hstu_trt.tables.terminal import Progress, Verbs, json_option

_CHUNK_ROWS = 1 << 20


def add_parsers(verbs: Verbs) -> None:
    """Adds the verb's parser."""
    text = "hash every shard again, check scales and permutations; exit code 2 names the damaged ones"
    one = verbs.add_parser("verify", parents=[json_option()], help=text, description=text)
    one.add_argument("folder", type=Path, help="the tables folder, e.g. MODEL/tables")
    one.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    folder = current_tables(options.folder)
    regenerate = REGENERATE.format(folder=folder)
    found = read_tables_folder(folder, regenerate=regenerate)
    progress = Progress(sum(entry["bytes"] for entry in found.files.values()), "hashed")
    damaged = damaged_files(found, progress)
    progress.end()
    wrong = [] if damaged else [text for table in found.tables.values() for text in wrong_values(folder, table)]
    if options.json:
        facts = {"files": len(found.files), "bytes": progress.total, "damaged": damaged, "wrong_values": wrong}
        print(json.dumps(facts, indent=1))
    if damaged:
        raise ArtefactError(
            f"{folder}: {', '.join(damaged)}: sha256 differs from the manifest; make it again with: {regenerate}"
        )
    if wrong:
        raise ArtefactError(f"{folder}: {'; '.join(wrong)}; make it again with: {regenerate}")
    if not options.json:
        size = bytes_text(progress.total)
        print(f"{folder}: {len(found.tables)} tables, {len(found.files)} shards, {size}: all as written")
    return 0


def damaged_files(found: TablesFolder, progress: Progress) -> list[str]:
    """The files whose sha256 is not the manifest's."""
    return [
        file
        for file, entry in found.files.items()
        if file_sha256(found.path / file, partial(progress.add, file)) != entry["sha256"]
    ]


def wrong_values(folder: Path, table: StoredTable) -> Iterator[str]:
    """Sentences on scales that are no scales, and on a permutation that is none."""
    arrays = open_arrays(folder, table)
    for number, scale in enumerate(arrays.scales):
        for first in range(0, len(scale), _CHUNK_ROWS):
            part = scale[first : first + _CHUNK_ROWS]
            bad = np.flatnonzero(~np.isfinite(part) | (part < 0))
            if bad.size:
                row = int(arrays.first_rows[number]) + first + int(bad[0])
                yield f"table {table.name}: the scale of row {row} is {part[bad[0]]}, it must be finite and >= 0"
                break
    if arrays.row_of_id is not None:
        yield from _wrong_permutation(arrays, arrays.row_of_id)


def _wrong_permutation(arrays: TableArrays, row_of_id: NDArray) -> Iterator[str]:
    table, seen = arrays.table, np.zeros(arrays.table.rows, bool)
    for first in range(0, len(row_of_id), _CHUNK_ROWS):
        rows = row_of_id[first : first + _CHUNK_ROWS]
        outside = np.flatnonzero(rows >= table.rows)
        if outside.size:
            id_ = first + int(outside[0])
            yield f"table {table.name}: id {id_} is permuted to row {row_of_id[id_]}, it has {table.rows} rows"
            return
        seen[rows] = True
    if not seen.all():
        yield f"table {table.name}: no id leads to row {int(np.argmin(seen))}"
