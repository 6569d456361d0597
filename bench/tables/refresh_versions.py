"""Versions to publish under load whose scores can be told apart: tables, deltas, dense weights, and bad ones."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.features import Tensors
from hstu_trt.contract.manifest import MANIFEST_NAME, read_document
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.model_folder import MODEL_KIND, TABLES_FOLDER, WEIGHTS_FILE, ModelFolder, read_model_folder
from hstu_trt.contract.model_folder import write_model_folder as write_manifest_of
from hstu_trt.contract.shards import Block, QuantisedRows, read_safetensors_header
from hstu_trt.contract.table_format import read_tables_folder, write_table, write_tables_manifest
from hstu_trt.contract.tensors import feature_columns
from hstu_trt.tables.delta import make_delta, tables_digest
from hstu_trt.tables.table_arrays import open_arrays, read_rows
from hstu_trt.tables.version import version_label

Rows = Mapping[str, NDArray]
"""Table -> row numbers."""

_MADE_BY = "hstu-trt bench refresh"
_OWN_MANIFEST = ("schema", "kind", "made_by", "files", "name", "precision", "contract", "config", "limits")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A version to publish, and what it must answer as."""

    name: str
    tables: Path
    """The whole tables that it answers as."""
    dense: ModelFolder
    label: str
    """As responses name it."""
    must_be_refused: bool = False


def rows_that_matter(model: ModelFolder, requests: list[Tensors]) -> Rows:
    """Rows of every request: its contextual rows, and that of its first candidate."""
    columns = feature_columns(model.ranking_config)
    rows: dict[str, set[int]] = {}
    for request in requests:
        for name in ("candidate_ids", "contextual_ids"):
            for column, feature in enumerate(columns.get(name, ())):
                table = model.ranking_config.table_of(feature).name
                rows.setdefault(table, set()).add(int(request[name][0, column]))
    return {table: np.asarray(sorted(row for row in found if row >= 0)) for table, found in rows.items()}


def write_changed(source: Path, out: Path, rows: Rows, seed: int, pair_id: str | None) -> Path:
    """A tables folder with some rows of another one drawn anew. Holds a table in memory."""
    found = read_tables_folder(source, regenerate=_MADE_BY)
    tables = []
    for name, table in found.tables.items():
        block = read_rows(open_arrays(source, table), 0, table.rows)
        _draw(block, rows.get(name, np.empty(0, np.int64)), seed)
        if table.ids.row_of_id is not None:
            (out / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / table.ids.row_of_id, out / table.ids.row_of_id)
        config = TableConfig(name=name, rows=table.rows, dim=table.dim, dtype="float16", features=table.features)
        tables.append(write_table(out, config, [block], dtype=table.dtype, ids=table.ids, row_order=table.row_order))
    write_tables_manifest(out, tables, _MADE_BY, {"pair_id": pair_id})
    return out


def _draw(block: Block, rows: NDArray, seed: int) -> None:
    random = np.random.default_rng(seed)
    if isinstance(block, QuantisedRows):
        block.scale[rows] *= random.uniform(0.2, 0.8, len(rows)).astype(np.float32)
    else:
        spread = float(block.astype(np.float32).std())
        block[rows] = random.normal(0, 2 * spread, (len(rows), block.shape[1])).astype(block.dtype)


def write_model(source: ModelFolder, out: Path, tables: Path, rows: Rows, seed: int) -> ModelFolder:
    """A model folder of other dense weights with tables of its own: a checkpoint of the same model, trained on."""
    out.mkdir(parents=True)
    for path in source.path.iterdir():
        if path.suffix in (".onnx", ".safetensors"):
            shutil.copyfile(path, out / path.name)
    pair_id = _shake(out / WEIGHTS_FILE, seed)
    write_changed(tables, out / TABLES_FOLDER, rows, seed, pair_id)
    document = read_document(source.path, kind=MODEL_KIND, regenerate=_MADE_BY)
    facts = {key: value for key, value in document.items() if key not in _OWN_MANIFEST}
    write_manifest_of(
        out, name=source.name, config=source.config, limits=source.limits, precision=source.precision,
        made_by=_MADE_BY, facts=facts | {"pair_id": pair_id},
    )  # fmt: skip
    return read_model_folder(out)


def _shake(weights: Path, seed: int) -> str:
    """Changes every floating weight by a few per cent, in place; returns the file's digest."""
    header, payload = read_safetensors_header(weights)
    content = bytearray(weights.read_bytes())
    random = np.random.default_rng(seed)
    for name, entry in header.items():
        dtype = {"F32": np.float32, "F16": np.float16}.get(entry.get("dtype")) if name != "__metadata__" else None
        if dtype is not None:
            first, end = (payload + at for at in entry["data_offsets"])
            values = np.frombuffer(memoryview(content)[first:end], dtype)
            values *= random.uniform(0.95, 1.05, len(values)).astype(dtype)
    weights.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


class Store:
    """A folder of versions that grows, each with new rows where the requests look."""

    def __init__(self, root: Path, model: ModelFolder, rows: Rows) -> None:
        self.root, self.model, self.rows = root / "versions", model, rows
        self._whole = root / "whole"
        self.root.mkdir(parents=True)
        self._seed = 0
        own = version_label(model.name, tables_digest(model.tables))
        self.last = Published(name="", tables=model.tables, dense=model, label=own)

    def tables(self, name: str) -> Published:
        """Whole tables of the last version's dense model."""
        folder = self._changed(self.root / name)
        return self._add(name, folder)

    def delta(self, name: str) -> Published:
        """A delta that leads on from the last version."""
        whole = self._changed(self._whole / name)
        before, after = (read_tables_folder(path, regenerate=_MADE_BY) for path in (self.last.tables, whole))
        make_delta(before, after, self.root / name, lambda table, done: None)
        return self._add(name, whole)

    def dense(self, name: str) -> Published:
        """A model folder of other dense weights and new tables."""
        self._seed += 1
        model = write_model(self.last.dense, self.root / name, self.last.tables, self.rows, self._seed)
        return self._add(name, model.tables, model)

    def foreign(self, name: str) -> Published:
        """Tables of dense weights that nobody has: to be refused."""
        self._seed += 1
        write_changed(self.last.tables, self.root / name, self.rows, self._seed, "0" * 64)
        return Published(name=name, tables=self.root / name, dense=self.model, label="", must_be_refused=True)

    def damaged(self, name: str) -> Published:
        """A version with one byte wrong: to be refused."""
        self._seed += 1
        folder = write_changed(self.last.tables, self.root / name, self.rows, self._seed, self.last.dense.pair_id)
        shard = sorted(path for path in folder.rglob("*.safetensors") if path.name != MANIFEST_NAME)[0]
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
        return Published(name=name, tables=folder, dense=self.model, label="", must_be_refused=True)

    def _changed(self, out: Path) -> Path:
        self._seed += 1
        return write_changed(self.last.tables, out, self.rows, self._seed, self.last.dense.pair_id)

    def _add(self, name: str, tables: Path, dense: ModelFolder | None = None) -> Published:
        label = version_label(name, tables_digest(tables))
        self.last = Published(name=name, tables=tables, dense=dense or self.last.dense, label=label)
        return self.last
