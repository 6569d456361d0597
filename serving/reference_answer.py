"""What the first answer of a server must be that serves one model, and has no second one to hold it against.

``assemble`` computes it from the model folder, by ONNX Runtime over host tables, for the request that ``serve`` sends
first, and keeps it as ``canary.json`` with the digest of the tables. Where others have been published since, ``serve``
computes it anew. Where only a cluster holds rows there is none, and the first answer is taken for the right one.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.manifest import read_json, write_text_atomically
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.table_versions import CURRENT_NAME
from hstu_trt.contract.tensors import ENSEMBLE
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.models.stages import RunnerStage
from hstu_trt.serving.refresh.releases import ReleaseFolder, check_published, open_tables_of
from hstu_trt.serving.refresh.settings import takes_previous
from hstu_trt.serving.requests import pack, sample
from hstu_trt.serving.signature import FIXED_FLAVOURS
from hstu_trt.tables.delta import tables_digest
from hstu_trt.tables.host import HostTables
from hstu_trt.tables.lookup_stage import RowsOfModel
from hstu_trt.tables.refresh import VersionOpener
from hstu_trt.tables.row_source import RowSource

FILE = "canary.json"


@dataclass(frozen=True)
class Reference:
    """Scores ``[candidates, tasks]`` of the sample request, and the digest of the tables that they come from."""

    tables: str
    scores: NDArray


def allowed_difference(model: ModelFolder) -> float:
    """Of the scores of two runners: each may be so far from the model in fp32."""
    return 2 * TOLERANCES[ENSEMBLE, model.tolerances].atol


def write_reference(folder: Path, model: ModelFolder, norm: str) -> None:
    """Computes the answer with the model's own tables into ``folder``. Raises ArtefactError."""
    tables = HostTables.open(model.tables)
    try:
        scores = _scores(model, tables, norm)
    finally:
        tables.close()
    document = {"tables": tables_digest(model.tables), "scores": scores.astype(float).tolist()}
    write_text_atomically(folder / FILE, json.dumps(document) + "\n")


def reference_of(deployment: Deployment, tables: str) -> Reference | None:
    """The answer with the tables whose digest begins with ``tables``, as a server named them; None: nobody knows it.

    Raises ArtefactError where the deployment's own cannot be read.
    """
    path = deployment.path / FILE
    # What is published may bring other dense weights with the same tables, unless the flavour keeps its own for good.
    is_own = deployment.flavour in FIXED_FLAVOURS or not (deployment.versions / CURRENT_NAME).exists()
    if is_own and path.is_file():
        kept = _read(path)
        if kept.tables.startswith(tables):
            return kept
    with suppress(HstuTrtError):  # rows that are not here, or a version that went meanwhile
        published = _published(deployment)
        return published if published is not None and published.tables.startswith(tables) else None
    return None


def _read(path: Path) -> Reference:
    try:
        document = read_json(path)
        return Reference(str(document["tables"]), np.asarray(document["scores"], dtype=np.float32))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtefactError(f"{path} is no answer to a canary ({error!r}); assemble the deployment again") from None


def _published(deployment: Deployment) -> Reference | None:
    folder = ReleaseFolder(deployment.versions, deployment.model, takes_previous(deployment.bad_version))
    version = check_published(folder)
    if version is None:
        return None
    dense = folder.dense_of(version)
    opened = open_tables_of(version, dense, VersionOpener())
    try:
        return Reference(opened.digest, _scores(dense, opened.rows, deployment.attention_norm))
    finally:
        opened.close()


def _scores(model: ModelFolder, tables: RowSource, norm: str) -> NDArray:
    """Scores ``[candidates, tasks]`` of the sample request, in this process."""
    from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner

    request = pack(model.ranking_config, [sample(model.ranking_config, model.limits)])
    rows, status = RowsOfModel(model, "reject").look_up(tables, request)
    payload: Tensors = {name: array for name, array in request.items() if name not in status}
    with OnnxRuntimeRunner.for_serving(model, "hstu") as hstu, OnnxRuntimeRunner.for_serving(model, "mlp_head") as head:
        vectors = RunnerStage(hstu, parse_fixed_norm(norm)).infer(rows | payload)
        found = RunnerStage(head, None).infer(vectors | {"candidate_embeddings": rows["candidate_embeddings"]})
    scores: NDArray = found["preds"]
    return scores
