"""Exported embedding tables as tensors."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hstu_trt.contract.table_format import SHARD_TENSOR, read_tables


def table_rows(tables: Path) -> dict[str, Tensor]:
    """The tables of a folder [rows, dim] by name, mapped into memory rather than read."""
    from safetensors import safe_open

    rows = {}
    for name, table in read_tables(tables, regenerate="hstu-trt export ...").items():
        with safe_open(tables / table.shards[0].file, framework="pt") as shard:
            rows[name] = shard.get_tensor(SHARD_TENSOR)
    return rows
