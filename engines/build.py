"""Building engines: an exported model and a target -> a folder that its runners execute.

    OUT/
      manifest.json       kind "engines": target, builder, precision, versions, model and its digest, load times
      <engines>           what the builder writes; nothing for ONNX Runtime, which runs the model folder's own files

A folder is named by what went into it: building again with the same model, target and builder changes nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import json_digest, read_document, read_manifest, write_manifest
from hstu_trt.contract.model_folder import REGENERATE, ModelFolder, contract_digest, read_model_folder
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.table_format import read_tables
from hstu_trt.engines.builders import Builder, BuiltStage
from hstu_trt.engines.onnx_runtime_builder import OnnxRuntimeBuilder
from hstu_trt.engines.targets import GpuTarget, find_target

ENGINES_KIND = "engines"
BUILD_COMMAND = "hstu-trt engines --model {model} --gpu {gpu} --precision {precision} --out {out}"


BUILDERS: Mapping[str, Builder] = {"onnxruntime": OnnxRuntimeBuilder()}


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What is to be built from what."""

    model: ModelFolder
    target: GpuTarget
    builder: Builder
    out: Path

    @property
    def digest(self) -> str:
        """sha256 over everything that determines the result."""
        return json_digest(
            {
                "model": self.model.digest,
                "target": self.target.name,
                "builder": self.builder.name,
                "versions": self.builder.versions(),
                "contract": contract_digest(self.model.specs),
            }
        )

    @property
    def command(self) -> str:
        """The command line that builds it."""
        return BUILD_COMMAND.format(
            model=self.model.path, gpu=self.target.name, precision=self.model.precision, out=self.out
        )


def make_plan(model_folder: Path, gpu: str, precision: str, out: Path) -> BuildPlan:
    """Checks model (with every sha256), target and precision. Raises ConfigError, ArtefactError."""
    target = find_target(gpu)
    if precision not in target.precisions:
        raise ConfigError(f"{gpu} has no precision {precision!r}: choose from {', '.join(target.precisions)}")
    model = read_model_folder(model_folder)
    remedy = REGENERATE.format(folder=model_folder)
    if model.precision != precision:
        raise ConfigError(
            f"{model_folder} was exported in {model.precision}, not {precision}; for {precision}: "
            + remedy.replace("--precision P", f"--precision {precision}")
        )
    if model.tables.is_dir():
        read_tables(model.tables, regenerate=remedy)
    return BuildPlan(model=model, target=target, builder=BUILDERS[target.builders[0]], out=out)


def stages_up_to_date(plan: BuildPlan) -> list[BuiltStage] | None:
    """The stages of ``plan.out`` if it already holds, undamaged, what the plan would build."""
    if not plan.out.exists() or (plan.out.is_dir() and not any(plan.out.iterdir())):
        return None
    try:
        document = read_document(plan.out, kind=ENGINES_KIND, regenerate=plan.command)
    except ArtefactError:
        # Somebody's work: refused here, and so never replaced.
        raise ConfigError(f"{plan.out} holds something else than engines; choose another --out") from None
    if document.get("digest") != plan.digest:
        return None
    try:
        read_manifest(plan.out, kind=ENGINES_KIND, regenerate=plan.command)
        return [BuiltStage(**entry) for entry in document["stages"]]
    except (ArtefactError, KeyError, TypeError):
        return None


def build(plan: BuildPlan) -> list[BuiltStage]:
    """Builds into ``plan.out``, which appears (or is replaced) in one step at the end."""
    with staged_folder(plan.out) as part:
        stages, files = plan.builder.build(plan.model, part)
        write_manifest(part, kind=ENGINES_KIND, made_by=plan.command, files=files, facts=_facts(plan, stages))
    return stages


def _facts(plan: BuildPlan, stages: Sequence[BuiltStage]) -> dict[str, Any]:
    return {
        "digest": plan.digest,
        "target": plan.target.name,
        "builder": plan.builder.name,
        "precision": plan.model.precision,
        "versions": {"python": platform.python_version(), **plan.builder.versions()},
        "model": {"name": plan.model.name, "folder": str(plan.model.path), "digest": plan.model.digest},
        "contract": contract_digest(plan.model.specs),
        "stages": [vars(stage) for stage in stages],
    }
