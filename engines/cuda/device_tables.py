"""Embedding tables in the GPU's memory, and the small ones as what the model makes of their rows.

An MLP over the rows of a small table has few distinct outputs: they are computed once, when the runner opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.stored_table import StoredTable
from hstu_trt.contract.table_format import SHARD_TENSOR, read_tables
from hstu_trt.engines.cuda.memory import require_free
from hstu_trt.engines.cuda.weights import ModelWeights
from hstu_trt.plugins import embedding

FOLDED_ROWS = 1 << 16
"""Tables of at most so many rows are folded into the product that reads them."""


def load_tables(model: ModelFolder, device: torch.device) -> dict[str, Tensor]:
    """The tables of a model folder [rows, dim] on a device.

    Raises ConfigError for rows that are quantised or moved, DeviceMemoryError for more than the device has free.
    """
    stored = read_tables(model.tables, regenerate="hstu-trt export ...")
    for name, table in stored.items():
        if table.is_quantised or table.row_order != "identity":
            raise ConfigError(
                f"table {name} of {model.path}: the cuda runner takes plain rows in the order of their ids"
            )
    require_free(sum(table.payload_bytes for table in stored.values()), device)
    return {name: _load_table(model.tables, table, device) for name, table in stored.items()}


def _load_table(folder: Path, table: StoredTable, device: torch.device) -> Tensor:
    """Rows [rows, dim], in their place at once: beside its shards a table would take twice the memory."""
    from safetensors import safe_open

    whole, begin = torch.empty((table.rows, table.dim), dtype=getattr(torch, table.dtype), device=device), 0
    for shard in table.shards:
        with safe_open(folder / shard.file, framework="pt") as file:
            rows = file.get_tensor(SHARD_TENSOR)
        whole[begin : begin + len(rows)].copy_(rows)
        begin += len(rows)
    return whole


class DeviceTables:
    """Tables by feature, with the outputs of small ones.

    tables: [rows, E] by name, all on one device.
    """

    def __init__(self, config: HstuConfig, tables: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        for table in config.tables:
            if table.name not in tables or tables[table.name].shape[1] != config.embedding_dim:
                raise ArtefactError(f"table {table.name} is missing, or not {config.embedding_dim} wide")
        self._config, self._tables, self._dtype = config, tables, dtype

    @property
    def memory_bytes(self) -> int:
        """Of the rows, without the outputs of small tables."""
        return sum(table.nbytes for table in self._tables.values())

    def of(self, feature: str) -> Tensor:
        """The table that a feature looks up in."""
        return self._tables[self._config.table_of(feature).name]

    def look_up(self, feature: str, ids: Tensor) -> Tensor:
        """Rows [n, E] of ids int64 [n]; ids outside of the table answer zeros."""
        table = self.of(feature)
        if table.is_cuda and self._dtype != torch.bfloat16:
            return embedding.lookup(ids, table, self._dtype)
        inside = (ids >= 0) & (ids < table.shape[0])
        return table[ids.clamp(0, table.shape[0] - 1)].to(self._dtype) * inside[:, None]

    def is_small(self, feature: str) -> bool:
        return self.of(feature).shape[0] <= FOLDED_ROWS

    def with_missing(self, feature: str) -> Tensor:
        """The table's rows in the compute dtype, and one of zeros: what an id outside of it answers."""
        table = self.of(feature).to(self._dtype)
        return torch.cat([table, table.new_zeros((1, table.shape[1]))])


def folded_additional(config: HstuConfig, weights: ModelWeights, tables: DeviceTables) -> Tensor | None:
    """[rows + 1, D]: what a single additional feature adds, by its id; None where it is not one small table."""
    if len(config.additional_features) != 1 or not tables.is_small(config.additional_features[0]):
        return None
    assert weights.additional is not None
    return weights.additional(tables.with_missing(config.additional_features[0]))
