"""A config and a checkpoint -> a model folder (``contract/model_folder.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.manifest import read_document
from hstu_trt.contract.model import AnyConfig, HstuConfig, ResearchHstuConfig, TableConfig
from hstu_trt.contract.model_folder import (
    MODEL_KIND,
    TABLES_FOLDER,
    TAPS,
    ModelFolder,
    read_model_folder,
    write_model_folder,
)
from hstu_trt.contract.split_users import one_user_feeds, user_count
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.tensors import (
    FUSED,
    RESEARCH_STAGE,
    Limits,
    Precision,
    float_dtype,
    research_specs,
    stage_specs,
)
from hstu_trt.export.build import build_ranking_model, build_research_model
from hstu_trt.export.calibration import largest_values
from hstu_trt.export.checkpoint import Checkpoint, pair_id
from hstu_trt.export.model import DlrmHstu
from hstu_trt.export.onnx_export import export_stage
from hstu_trt.export.onnx_files import write_graphs
from hstu_trt.export.quantise import fp8_modules, put_fp8
from hstu_trt.export.research import ITEM_TABLE, SequenceEncoderStage
from hstu_trt.export.stages import TORCH_DTYPES, EmbeddingStage, FusedStage, HeadStage, HstuStage, Stage
from hstu_trt.export.tables import Progress, table_rows, write_tables


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


def export_model(job: ExportJob, out: Path, progress: Progress = lambda _: None) -> ModelFolder:
    """Writes the model folder beside ``out``, then puts it in its place: an error leaves what was there.

    Raises ArtefactError for weights and tables that do not fit the config, and where ``out`` is somebody else's folder;
    InputError for requests that fp8 cannot be calibrated with; OSError where files cannot be written.
    """
    _refuse_foreign(out)
    tables = _table_configs(job)
    origin = {"weights": job.checkpoint.source, "pair_id": pair_id(job.checkpoint.dense)}
    with staged_folder(out) as folder:
        sources = [(table, job.checkpoint.tables[table.name]) for table in tables]
        write_tables(folder / TABLES_FOLDER, sources, job.precision, job.made_by, origin, progress)
        if isinstance(job.config, HstuConfig):
            dense, stages = _ranking_stages(job, folder / TABLES_FOLDER, progress)
        else:
            dense, stages = _research_stages(job)
        write_graphs(folder, dense, _traced(stages, job.config.layers, progress), tables, progress)
        write_model_folder(
            folder,
            name=job.name,
            config=job.config,
            limits=job.limits,
            precision=job.precision,
            made_by=job.made_by,
            facts={
                **origin,
                **_fp8_facts(job.quantisation),
                "versions": {"torch": torch.__version__, "onnx": onnx.__version__},
            },
        )
    return read_model_folder(out, verify=False)


def _traced(stages: Mapping[str, Stage], layers: int, progress: Progress) -> dict[str, onnx.ModelProto]:
    models: dict[str, onnx.ModelProto] = {}
    for name, stage in stages.items():
        progress(f"tracing {name}")
        models[name] = export_stage(stage, [f"stu.{layer}.out" for layer in range(layers if name == TAPS else 0)])
    return models


def _refuse_foreign(out: Path) -> None:
    """Only an earlier model folder, or nothing, may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_document(out, kind=MODEL_KIND, regenerate="")
    except (ArtefactError, NotADirectoryError):
        raise ArtefactError(f"{out} exists and is no model folder of ours; choose another --out or remove it") from None


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


def _research_stages(job: ExportJob) -> tuple[dict[str, Tensor], dict[str, Stage]]:
    assert isinstance(job.config, ResearchHstuConfig)
    model = build_research_model(job.config, job.checkpoint.dense, job.checkpoint.source)
    spec = research_specs(job.config, job.limits)[RESEARCH_STAGE]
    stage = SequenceEncoderStage(spec, model, torch.zeros(1, job.config.model_dim))
    return model.state_dict(), {RESEARCH_STAGE: stage}


def _table_configs(job: ExportJob) -> tuple[TableConfig, ...]:
    if isinstance(job.config, HstuConfig):
        return job.config.tables
    source = job.checkpoint.tables[ITEM_TABLE]
    return (TableConfig(name=ITEM_TABLE, rows=source.rows, dim=source.dim, dtype="float32", features=(ITEM_TABLE,)),)
