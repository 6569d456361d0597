"""Where an export takes its weights from: a checkpoint, an exported model, or a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import MANIFEST_NAME, read_json
from hstu_trt.contract.model import AnyConfig, HstuConfig
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.text import number_in
from hstu_trt.export.build import dense_weights
from hstu_trt.export.checkpoint import Checkpoint, TableSource, load_checkpoint
from hstu_trt.export.research import ITEM_TABLE, ITEM_TABLE_KEY
from hstu_trt.export.tables import table_rows
from hstu_trt.export.weights import random_checkpoint, resolve_tables

HEAVY_TAILED = "random-heavy"
RANDOM_SOURCES = ("random", HEAVY_TAILED)
_COPY_BLOCK_ROWS = 1 << 16


def read_weights(config: AnyConfig, source: str) -> Checkpoint:
    """Weights from a file, a checkpoint directory, an exported model, ``random:SEED`` or ``random-heavy:SEED``.

    Raises ArtefactError for files that hold something else, ConfigError for a seed that is none.
    """
    kind, _, text = source.partition(":")
    if kind not in RANDOM_SOURCES:
        checkpoint = exported_checkpoint(Path(source)) if is_exported(source) else load_checkpoint(Path(source))
        return checkpoint if isinstance(config, HstuConfig) else _with_item_table(checkpoint)
    seed = number_in(text)
    if seed is None:
        raise ConfigError(f"weights {source}: expected {kind}:SEED with a whole number of at most 18 digits")
    if not isinstance(config, HstuConfig):
        raise ConfigError("random weights are there for ranking models only")
    return random_checkpoint(config, seed, heavy_tailed=kind == HEAVY_TAILED)


def is_exported(source: str) -> bool:
    """Whether weights come from a model folder."""
    return (Path(source) / MANIFEST_NAME).is_file()


def exported_checkpoint(folder: Path) -> Checkpoint:
    """The weights and tables of an exported model, to make another precision of it. Raises ArtefactError."""
    model = read_model_folder(folder)
    if model.precision == "fp8" or not isinstance(model.config, HstuConfig):
        what = "weights in fp8" if model.precision == "fp8" else "a sequence encoder"
        raise ArtefactError(f"{folder} holds {what}; export from the checkpoint, or from its fp32 or fp16 folder")
    dense = dense_weights(model)
    rows = table_rows(model.tables)
    tables = {
        t.name: TableSource(name=t.name, rows=t.rows, dim=t.dim, dtype=t.dtype, blocks=_blocks_of(rows[t.name]))
        for t in model.config.tables
    }
    return Checkpoint(source=str(folder), dense=dense, tables=tables)


def _blocks_of(rows: Tensor) -> Callable[[], Iterator[NDArray]]:
    return lambda: (block.numpy() for block in rows.split(_COPY_BLOCK_ROWS))


def with_tables(config: AnyConfig, checkpoint: Checkpoint, hints: Mapping[str, str]) -> AnyConfig:
    """The config with its tables filled in from the checkpoint (``resolve_tables``). Raises ConfigError."""
    return resolve_tables(config, checkpoint.tables, hints) if isinstance(config, HstuConfig) else config


def table_hints(config_file: Path) -> dict[str, str]:
    """Feature -> table from the comments of a config file written by the reference's dumper; {} where there is none."""
    try:
        tables = read_json(config_file)["_derived"]["tables"]
        return {feature: name for name, table in tables.items() for feature in table["feature_names"]}
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}


def _with_item_table(checkpoint: Checkpoint) -> Checkpoint:
    """A research checkpoint keeps its item table among the dense weights: makes it a table."""
    if ITEM_TABLE_KEY not in checkpoint.dense:
        raise ArtefactError(f"{checkpoint.source}: the item table {ITEM_TABLE_KEY!r} is missing")
    weight = checkpoint.dense[ITEM_TABLE_KEY].float()
    table = TableSource(
        name=ITEM_TABLE,
        rows=weight.shape[0],
        dim=weight.shape[1],
        dtype="float32",
        blocks=lambda: iter([weight.numpy()]),
    )
    return Checkpoint(source=checkpoint.source, dense=checkpoint.dense, tables={ITEM_TABLE: table})
