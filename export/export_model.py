"""A config and a checkpoint -> a model folder (``contract/model_folder.py``)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.manifest import MANIFEST_NAME, read_document
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
from hstu_trt.contract.split_users import one_user_feeds, user_count
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
from hstu_trt.export.calibration import largest_values
from hstu_trt.export.checkpoint import Checkpoint, TableSource, load_checkpoint
from hstu_trt.export.model import DlrmHstu
from hstu_trt.export.onnx_export import (
    export_stage,
    is_external,
    point_outside,
    save_checked,
    table_of_initializer,
)
from hstu_trt.export.quantise import fp8_modules, put_fp8
from hstu_trt.export.research import ITEM_TABLE, ITEM_TABLE_KEY, SequenceEncoderStage
from hstu_trt.export.stages import TORCH_DTYPES, EmbeddingStage, FusedStage, HeadStage, HstuStage, Stage
from hstu_trt.export.tables import table_rows
from hstu_trt.export.weights import random_checkpoint, resolve_tables

HEAVY_TAILED = "random-heavy"
RANDOM_SOURCES = ("random", HEAVY_TAILED)
_COPY_BLOCK_ROWS = 1 << 16
ONE_SHARD = 1 << 62

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How to make an fp8 model."""

    sites: tuple[str, ...]
    """The parts that compute in fp8 (``contract/fp8_plan.py``)."""
    requests: Tensors
    """A packed request of several users with its ``attention_norm``, to calibrate with."""
    source: str
    """Where the requests come from, for the manifest."""


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
    quantisation: Quantisation | None = None
    """Of a job in fp8."""


def read_weights(config: AnyConfig, source: str) -> Checkpoint:
    """Weights from a file, a checkpoint directory, an exported model, ``random:SEED`` or ``random-heavy:SEED``."""
    kind, _, seed = source.partition(":")
    if kind not in RANDOM_SOURCES:
        return exported_checkpoint(Path(source)) if is_exported(source) else load_checkpoint(Path(source))
    if not seed.isdigit():
        raise ConfigError(f"weights {source}: the seed after '{kind}:' must be a whole number")
    if not isinstance(config, HstuConfig):
        raise ConfigError("random weights are there for ranking models only")
    return random_checkpoint(config, int(seed), heavy_tailed=kind == HEAVY_TAILED)


def is_exported(source: str) -> bool:
    """Whether weights come from a model folder."""
    return (Path(source) / MANIFEST_NAME).is_file()


def exported_checkpoint(folder: Path) -> Checkpoint:
    """The weights and tables of an exported model, to make another precision of it. Raises ArtefactError."""
    from safetensors.torch import load_file

    model = read_model_folder(folder)
    if model.precision == "fp8" or not isinstance(model.config, HstuConfig):
        what = "weights in fp8" if model.precision == "fp8" else "a sequence encoder"
        raise ArtefactError(f"{folder} holds {what}; export from the checkpoint, or from its fp32 or fp16 folder")
    dense = {key: value for key, value in load_file(model.weights).items() if key.startswith("_")}
    rows = table_rows(model.tables)
    tables = {
        t.name: TableSource(name=t.name, rows=t.rows, dim=t.dim, dtype=t.dtype, blocks=_blocks_of(rows[t.name]))
        for t in model.config.tables
    }
    return Checkpoint(source=str(folder), dense=dense, tables=tables)


def _blocks_of(rows: Tensor) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: (block.numpy() for block in rows.split(_COPY_BLOCK_ROWS))


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
        if isinstance(job.config, HstuConfig):
            dense, stages = _ranking_stages(job, folder / TABLES_FOLDER, progress)
        else:
            dense, stages = _research_stages(job)
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
                **_fp8_facts(job.quantisation),
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


def _fp8_facts(quantisation: Quantisation | None) -> dict[str, Any]:
    if quantisation is None:
        return {}
    return {
        "fp8_sites": list(quantisation.sites),
        "calibration": {
            "requests": quantisation.source,
            "users": user_count(quantisation.requests),
            "attention_norm": float(quantisation.requests["attention_norm"][0]),
        },
    }


def _quantised_model(job: ExportJob, tables: Path, progress: Progress) -> DlrmHstu:
    """The fp16 model with fp8 modules, calibrated on the fp32 one."""
    assert isinstance(job.config, HstuConfig) and job.quantisation is not None
    sites, requests = job.quantisation.sites, job.quantisation.requests
    progress(f"calibrating on {user_count(requests)} users of {job.quantisation.source}")
    model = build_ranking_model(job.config, job.checkpoint.dense, job.checkpoint.source, "fp32")
    lookup = EmbeddingStage(
        stage_specs(job.config, job.limits, "fp32")["embedding_lookup"], job.config, table_rows(tables), "float32"
    )
    modules = fp8_modules(model, largest_values(model, lookup, one_user_feeds(requests)))
    half = build_ranking_model(job.config, job.checkpoint.dense, job.checkpoint.source, "fp16")
    return put_fp8(half, sites, modules)


def _ranking_stages(job: ExportJob, tables: Path, progress: Progress) -> tuple[dict[str, Tensor], dict[str, Stage]]:
    """The dense weights as they are computed with, and the stages by name."""
    assert isinstance(job.config, HstuConfig)
    if job.precision == "fp8":
        model = _quantised_model(job, tables, progress)
    else:
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
    weights = {key: value.contiguous() for key, value in dense.items()}
    # What tracing itself made (folded constants) has names that mean nothing outside its graph.
    made = {
        f"{stage}.{initializer.name}": torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())
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


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Writes tensors and returns where each lies: name -> (offset in the file, bytes)."""
    from safetensors.torch import save_file

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
