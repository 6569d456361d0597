"""A config and a checkpoint -> a model folder (``contract/model_folder.py``)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_document
from hstu_trt.contract.model import AnyConfig, HstuConfig, ResearchHstuConfig, TableConfig
from hstu_trt.contract.model_folder import (
    MODEL_KIND,
    TABLES_FOLDER,
    TAPS,
    WEIGHTS_FILE,
    ModelFolder,
    read_model_folder,
    write_model_folder,
)
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.table_format import PAYLOAD_ALIGNMENT, write_table, write_tables_manifest
from hstu_trt.contract.tensors import (
    FUSED,
    RESEARCH_STAGE,
    Limits,
    Precision,
    float_dtype,
    research_specs,
    stage_specs,
)
from hstu_trt.contract.text import bytes_text
from hstu_trt.export.build import build_ranking_model, build_research_model
from hstu_trt.export.checkpoint import Checkpoint, TableSource, load_checkpoint
from hstu_trt.export.onnx_export import (
    export_stage,
    is_external,
    point_outside,
    save_checked,
    table_of_initializer,
)
from hstu_trt.export.research import ITEM_TABLE, ITEM_TABLE_KEY, SequenceEncoderStage
from hstu_trt.export.stages import TORCH_DTYPES, EmbeddingStage, FusedStage, HeadStage, HstuStage, Stage
from hstu_trt.export.weights import random_checkpoint, resolve_tables

RANDOM_SOURCE = "random:"
ONE_SHARD = 1 << 62

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """What to export, from where, and to where."""

    name: str
    config: AnyConfig
    checkpoint: Checkpoint
    limits: Limits
    precision: Precision
    made_by: str
    """The command that makes the folder again, for its manifest."""


def read_weights(config: AnyConfig, source: str) -> Checkpoint:
    """Weights from a file, a checkpoint directory, or ``random:SEED``."""
    if not source.startswith(RANDOM_SOURCE):
        return load_checkpoint(Path(source))
    seed = source.removeprefix(RANDOM_SOURCE)
    if not seed.isdigit():
        raise ConfigError(f"weights {source}: the seed after {RANDOM_SOURCE!r} must be a whole number")
    if not isinstance(config, HstuConfig):
        raise ConfigError("random weights are there for ranking models only")
    return random_checkpoint(config, int(seed))


def with_tables(config: AnyConfig, checkpoint: Checkpoint, hints: Mapping[str, str]) -> AnyConfig:
    """The config with its tables filled in from the checkpoint."""
    return resolve_tables(config, checkpoint.tables, hints) if isinstance(config, HstuConfig) else config


def table_hints(config_file: Path) -> dict[str, str]:
    """Feature -> table from the comments of a config file written by the reference's dumper; {} where there is none."""
    if not config_file.is_file():
        return {}
    try:
        tables = json.loads(config_file.read_text())["_derived"]["tables"]
        return {feature: name for name, table in tables.items() for feature in table["feature_names"]}
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def export_model(job: ExportJob, out: Path, progress: Progress = lambda _: None) -> ModelFolder:
    """Writes the model folder in one step: whoever looks sees the old one or the new one. Raises HstuTrtError."""
    _refuse_foreign(out)
    with staged_folder(out) as folder:
        tables = _write_tables(job, folder, progress)
        dense, stages = _ranking_stages(job) if isinstance(job.config, HstuConfig) else _research_stages(job)
        models: dict[str, onnx.ModelProto] = {}
        for name, stage in stages.items():
            progress(f"tracing {name}")
            taps = job.config.layers if name == TAPS else 0
            models[name] = export_stage(stage, [f"stu.{layer}.out" for layer in range(taps)])
        _write_files(folder, dense, models, tables, progress)
        write_model_folder(
            folder,
            name=job.name,
            config=job.config,
            limits=job.limits,
            precision=job.precision,
            made_by=job.made_by,
            facts={
                "weights": job.checkpoint.source,
                "pair_id": pair_id(job.checkpoint.dense),
                "versions": {"torch": torch.__version__, "onnx": onnx.__version__},
            },
        )
    return read_model_folder(out, verify=False)


def _refuse_foreign(out: Path) -> None:
    """Only an earlier model folder, or nothing, may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_document(out, kind=MODEL_KIND, regenerate="")
    except (ArtefactError, NotADirectoryError):
        raise ArtefactError(f"{out} exists and is no model folder of ours; choose another --out or remove it") from None


def _table_configs(job: ExportJob) -> tuple[TableConfig, ...]:
    if isinstance(job.config, HstuConfig):
        return job.config.tables
    source = job.checkpoint.tables[ITEM_TABLE]
    return (TableConfig(name=ITEM_TABLE, rows=source.rows, dim=source.dim, dtype="float32", features=(ITEM_TABLE,)),)


def _write_tables(job: ExportJob, folder: Path, progress: Progress) -> dict[str, TableConfig]:
    """Writes each table as one shard: an ONNX initializer is one piece of one file."""
    _check_disk(folder, _table_configs(job))
    stored = []
    for table in _table_configs(job):
        features = ", ".join(table.features)
        progress(f"writing table {table.name}: {table.rows} x {table.dim} {table.dtype} <- {features}")
        source = job.checkpoint.tables[table.name]
        blocks = _checked(source.blocks(), table, job.precision)
        stored.append(write_table(folder / TABLES_FOLDER, table, blocks, shard_bytes=ONE_SHARD))
    facts = {"weights": job.checkpoint.source, "pair_id": pair_id(job.checkpoint.dense)}
    write_tables_manifest(folder / TABLES_FOLDER, stored, job.made_by, facts)
    return {table.name: table for table in _table_configs(job)}


def pair_id(dense: Mapping[str, Tensor]) -> str:
    """Digest of a checkpoint's dense weights: a model and tables that bear the same one were trained together."""
    digest = hashlib.sha256()
    for key in sorted(dense):
        weight = dense[key].detach().contiguous()
        digest.update(f"{key} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _checked(blocks: Iterable[np.ndarray], table: TableConfig, precision: Precision) -> Iterator[np.ndarray]:
    """Passes blocks of rows on, and refuses values that no score survives."""
    limit = np.finfo(float_dtype(precision)).max
    first = 0
    for block in blocks:
        bad = ~(np.abs(block) <= limit)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise ArtefactError(
                f"table {table.name} holds {block[row, column]} at [{first + row}, {column}], outside {precision}"
            )
        first += len(block)
        yield block


def _check_disk(folder: Path, tables: Iterable[TableConfig]) -> None:
    needed = sum(t.rows * t.dim * np.dtype(t.dtype).itemsize for t in tables)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ArtefactError(
            f"the tables need {bytes_text(needed)}, {folder.parent} has {bytes_text(free)} free; choose another --out"
            " (with random weights, --table-rows makes a table smaller)"
        )


def _ranking_stages(job: ExportJob) -> tuple[dict[str, Tensor], dict[str, Stage]]:
    """The dense weights as they are computed with, and the stages by name."""
    assert isinstance(job.config, HstuConfig)
    model = build_ranking_model(job.config, job.checkpoint.dense, job.checkpoint.source, job.precision)
    specs = stage_specs(job.config, job.limits, job.precision)
    # One row stands for a table while tracing; its rows stay in the tables folder. The stand-ins differ, since the
    # exporter merges equal initialisers into one.
    stand_ins = {
        t.name: torch.full((1, t.dim), number, dtype=TORCH_DTYPES[t.dtype])
        for number, t in enumerate(job.config.tables)
    }
    dtype = float_dtype(job.precision)
    embedding = EmbeddingStage(specs["embedding_lookup"], job.config, stand_ins, dtype)
    return model.state_dict(), {
        "embedding_lookup": embedding,
        "hstu": HstuStage(specs["hstu"], model),
        "mlp_head": HeadStage(specs["mlp_head"], model),
        FUSED: FusedStage(specs[FUSED], embedding, model),
        TAPS: HstuStage(specs["hstu"], model, taps=True),
    }


def split_item_table(checkpoint: Checkpoint) -> Checkpoint:
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


def _research_stages(job: ExportJob) -> tuple[dict[str, Tensor], dict[str, Stage]]:
    assert isinstance(job.config, ResearchHstuConfig)
    model = build_research_model(job.config, job.checkpoint.dense, job.checkpoint.source)
    spec = research_specs(job.config, job.limits)[RESEARCH_STAGE]
    stage = SequenceEncoderStage(spec, model, torch.zeros(1, job.config.model_dim))
    return model.state_dict(), {RESEARCH_STAGE: stage}


def _write_files(
    folder: Path,
    dense: Mapping[str, Tensor],
    models: Mapping[str, onnx.ModelProto],
    tables: Mapping[str, TableConfig],
    progress: Progress,
) -> None:
    """Writes one safetensors file of weights, lets every graph refer to it, and saves the graphs."""
    weights = {key: value.contiguous().numpy() for key, value in dense.items()}
    # What tracing itself made (folded constants) has names that mean nothing outside its graph.
    made = {
        f"{stage}.{initializer.name}": onnx.numpy_helper.to_array(initializer)
        for stage, model in models.items()
        for initializer in model.graph.initializer
        if initializer.name not in weights and is_external(initializer) and not table_of_initializer(initializer)
    }
    offsets = _write_weights(folder / WEIGHTS_FILE, weights | made)
    for stage, model in models.items():
        for initializer in model.graph.initializer:
            table = table_of_initializer(initializer)
            if table is not None:
                _point_at_table(initializer, tables[table])
            elif is_external(initializer):
                name = initializer.name if initializer.name in weights else f"{stage}.{initializer.name}"
                point_outside(initializer, WEIGHTS_FILE, *offsets[name])
        progress(f"checking {stage}.onnx")
        save_checked(model, folder / f"{stage}.onnx")


def _point_at_table(initializer: onnx.TensorProto, table: TableConfig) -> None:
    size = table.rows * table.dim * np.dtype(table.dtype).itemsize
    initializer.dims[:] = [table.rows, table.dim]
    point_outside(initializer, f"{TABLES_FOLDER}/{table.name}/00000.safetensors", PAYLOAD_ALIGNMENT, size)


def _write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """Writes tensors and returns where each lies: name -> (offset in the file, bytes)."""
    from safetensors.numpy import save_file

    save_file(dict(weights), path)
    path.chmod(0o644)  # safetensors makes files that only their owner reads; a server is another user
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    begin = 8 + length
    return {
        name: (begin + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
