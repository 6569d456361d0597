"""The model folder: what export hands to engines, serving and bench.

build/onnx/<model>/<precision>/
  manifest.json            kind "onnx": config, limits, precision, stages, versions
  embedding_lookup.onnx    the three stages of a ranking model (``sequence_encoder.onnx`` for the research family)
  hstu.onnx
  mlp_head.onnx
  ranking_fused.onnx       all of it in one graph
  hstu_taps.onnx           hstu with a full last layer and every layer's output, for debugging
  weights.safetensors      dense weights of all of them: external data of the .onnx files
  tables/                  embedding tables (``table_format.py``)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_trt.contract.config_json import config_from_json, config_to_json
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.fp8_plan import layer_sites
from hstu_trt.contract.manifest import MANIFEST_NAME, json_digest, read_document, read_manifest, write_manifest
from hstu_trt.contract.model import AnyConfig, HstuConfig
from hstu_trt.contract.numerics import FP8_BEYOND_LAYERS
from hstu_trt.contract.ops import OPS
from hstu_trt.contract.tensors import FUSED, STAGES, Limits, Precision, StageSpec, research_specs, stage_specs

MODEL_KIND = "onnx"
TAPS = "hstu_taps"
WEIGHTS_FILE = "weights.safetensors"
TABLES_FOLDER = "tables"
REGENERATE = "hstu-trt export --config CONFIG --weights WEIGHTS --precision P --out {folder}"


def contract_digest(specs: dict[str, StageSpec]) -> str:
    """A digest of the seams: stages and ops. Artefacts of another digest do not fit together."""
    return json_digest(
        {
            "stages": {name: dataclasses.asdict(spec) for name, spec in specs.items()},
            "ops": {name: dataclasses.asdict(spec) for name, spec in OPS.items()},
        }
    )


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """An exported model on disk."""

    path: Path
    name: str
    """The model's name, for messages and reports."""
    config: AnyConfig
    limits: Limits
    precision: Precision
    fp8_sites: tuple[str, ...] = ()
    """In an fp8 model, the parts that compute in fp8 (``contract/fp8_plan.py``); the others compute in fp16."""
    digest: str
    """sha256 over the manifest: changes whenever any file that it lists does (all of them, see ``require_whole``)."""
    pair_id: str | None = None
    """Digest of the checkpoint's dense weights; its tables bear the same one. None: unknown."""

    @property
    def tolerances(self) -> str:
        """The row of ``numerics.TOLERANCES`` that its outputs are held to."""
        if self.precision == "fp8" and not set(self.fp8_sites) <= set(layer_sites(self.ranking_config)):
            return FP8_BEYOND_LAYERS
        return self.precision

    @property
    def specs(self) -> dict[str, StageSpec]:
        """The stages of the model, by name."""
        if isinstance(self.config, HstuConfig):
            return stage_specs(self.config, self.limits, self.precision)
        return research_specs(self.config, self.limits)

    @property
    def ranking_config(self) -> HstuConfig:
        """The config of a ranking model. Raises ArtefactError for the research family."""
        if not isinstance(self.config, HstuConfig):
            raise ArtefactError(f"{self.path} holds a sequence encoder; this needs a ranking model (DlrmHSTU)")
        return self.config

    @property
    def tables(self) -> Path:
        return self.path / TABLES_FOLDER

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS_FILE

    def onnx(self, stage: str) -> Path:
        """The ONNX file of a stage (or of ``hstu_taps``)."""
        return self.path / f"{stage}.onnx"


def onnx_stages(config: AnyConfig) -> tuple[str, ...]:
    """The stages that have an ONNX file of their own."""
    return (*STAGES, FUSED) if isinstance(config, HstuConfig) else tuple(research_specs(config, _ANY_LIMITS))


_ANY_LIMITS = Limits(users=1, history=1, candidates=1, batch_history=1, batch_candidates=1)


def write_model_folder(
    folder: Path,
    *,
    name: str,
    config: AnyConfig,
    limits: Limits,
    precision: Precision,
    made_by: str,
    facts: dict[str, Any],
) -> None:
    """Writes the manifest over the files already in ``folder``."""
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".onnx", ".safetensors"))
    tables_manifest = f"{TABLES_FOLDER}/manifest.json"
    specs = stage_specs(config, limits, precision) if isinstance(config, HstuConfig) else research_specs(config, limits)
    write_manifest(
        folder,
        kind=MODEL_KIND,
        made_by=made_by,
        files=[*files, tables_manifest],
        facts={
            "name": name,
            "precision": precision,
            "contract": contract_digest(specs),
            "config": config_to_json(config),
            "limits": dataclasses.asdict(limits),
            **facts,
        },
    )


def read_model_folder(folder: Path, *, verify: bool = True) -> ModelFolder:
    """Reads an exported model and checks its files (with sha256 unless ``verify`` is off) and its contract digest.

    Raises ArtefactError that names the file and the command that makes the folder again.
    """
    regenerate = REGENERATE.format(folder=folder)
    document = read_manifest(folder, kind=MODEL_KIND, regenerate=regenerate, verify=verify)
    try:
        model = ModelFolder(
            path=folder,
            name=_text(document, "name"),
            config=config_from_json(document["config"]),
            limits=Limits(**document["limits"]),
            precision=document["precision"],
            fp8_sites=_sites(document),
            digest=json_digest(document),
            pair_id=None if document.get("pair_id") is None else _text(document, "pair_id"),
        )
        fits = document["contract"] == contract_digest(model.specs)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ArtefactError(
            f"{folder}: its manifest is malformed ({error}); make it again with: {regenerate}"
        ) from None
    if not fits:
        raise ArtefactError(f"{folder} was exported under another contract; make it again with: {regenerate}")
    return model


def _text(document: dict[str, Any], key: str) -> str:
    value = document[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a text, got {value!r}")
    return value


def _sites(document: dict[str, Any]) -> tuple[str, ...]:
    sites = document.get("fp8_sites", [])
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise ValueError(f"fp8_sites must be a list of names, got {sites!r}")
    return tuple(sites)


def require_whole(model: ModelFolder) -> None:
    """That a model's digest tells all that it answers: its manifest lists every file, and none is elsewhere.

    What a manifest does not list can change behind an unchanged digest, a file behind a link as well.
    Raises ArtefactError.
    """
    regenerate = REGENERATE.format(folder=model.path)
    listed = set(read_document(model.path, kind=MODEL_KIND, regenerate=regenerate)["files"])
    needed = [f"{stage}.onnx" for stage in onnx_stages(model.config)]
    present = [
        path.relative_to(model.path) for path in sorted(model.path.rglob("*")) if path.is_symlink() or not path.is_dir()
    ]
    found = [str(path) for path in present if path.parts[0] != TABLES_FOLDER and not path.name.startswith(".")]
    for file in (*needed, WEIGHTS_FILE, f"{TABLES_FOLDER}/{MANIFEST_NAME}", *found):
        if file not in listed and file != MANIFEST_NAME:
            raise ArtefactError(
                f"{model.path}: {file} is not among the files of its manifest; remove it, or make the folder again "
                f"with: {regenerate}"
            )
    home = model.path.resolve()
    for file in listed:
        if not (model.path / file).resolve().is_relative_to(home):
            raise ArtefactError(f"{model.path}: {file} is behind a link that leads outside of the folder")
