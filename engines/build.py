"""Building engines: an exported model and a target -> a folder that its runners execute.

    OUT/
      manifest.json       kind "engines": target, builder, precision, versions, model and its digest, load times
      <engines>           what the builder writes; nothing for ONNX Runtime, which runs the model folder's own files

A folder is named by what went into it: building again with the same model, target and builder changes nothing. Single
engines are kept by what went into them, under build/cache/plans (``plan_store.py``).
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import json_digest, read_document, read_manifest, write_manifest
from hstu_trt.contract.model_folder import REGENERATE, contract_digest, read_model_folder
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.table_format import read_tables
from hstu_trt.engines.builders import Builder, BuildOptions, BuildRequest, BuiltStage
from hstu_trt.engines.commands import engines_command
from hstu_trt.engines.engine_folder import ENGINES_KIND
from hstu_trt.engines.modules import FLAVOURS
from hstu_trt.engines.onnx_runtime_builder import OnnxRuntimeBuilder
from hstu_trt.engines.refusals import check_precision
from hstu_trt.engines.targets import find_target
from hstu_trt.engines.tensorrt_builder import TensorRtBuilder

CACHE = Path("build/cache")

BUILDERS: Mapping[str, Builder] = {
    "onnxruntime": OnnxRuntimeBuilder(),
    **{name: TensorRtBuilder(flavour) for name, flavour in FLAVOURS.items()},
}


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What is to be built from what, by whom, and where to."""

    request: BuildRequest
    builder: Builder
    out: Path

    @property
    def digest(self) -> str:
        """sha256 over everything that determines the result."""
        facts = {name: fact for name, fact in self.builder.facts(self.request).items() if name != "driver"}
        return json_digest(
            {
                "model": self.request.model.digest,
                "target": self.request.target.name,
                "builder": self.builder.name,
                "versions": self.builder.versions(),
                "options": self.request.options.facts(),
                "facts": facts,
                "contract": contract_digest(self.request.model.specs),
            }
        )

    @property
    def command(self) -> str:
        """The command line that builds it."""
        return engines_command(self.request, self.builder.name, self.out)


def make_plan(  # noqa: PLR0913 - the options of the verb
    model_folder: Path,
    gpu: str,
    precision: str,
    out: Path,
    *,
    builder: str | None = None,
    options: BuildOptions | None = None,
    cache: Path = CACHE,
    quiet: bool = True,
) -> BuildPlan:
    """Checks model (with every sha256), target and precision. Raises ConfigError, ArtefactError."""
    target = find_target(gpu)
    check_precision(gpu, precision)
    if builder is not None and builder not in target.builders:
        raise ConfigError(f"no builder {builder!r} for {gpu}: choose from {', '.join(target.builders)}")
    model = read_model_folder(model_folder)
    remedy = REGENERATE.format(folder=model_folder)
    if model.precision != precision:
        raise ConfigError(
            f"{model_folder} was exported in {model.precision}, not {precision}; for {precision}: "
            f"hstu-trt export --config CONFIG --weights WEIGHTS --precision {precision} --out ANOTHER"
        )
    if model.tables.is_dir():
        read_tables(model.tables, regenerate=remedy)
    request = BuildRequest(model=model, target=target, options=options or BuildOptions(), cache=cache, quiet=quiet)
    return BuildPlan(request=request, builder=BUILDERS[builder or target.builders[0]], out=out)


def stages_up_to_date(plan: BuildPlan) -> list[BuiltStage] | None:
    """The stages of ``plan.out`` if it already holds, undamaged, what the plan would build."""
    document = _document(plan)
    if document is None or document.get("digest") != plan.digest:
        return None
    return list(_undamaged(plan) or []) or None


def build(plan: BuildPlan, *, force: bool = False) -> list[BuiltStage]:
    """Builds into ``plan.out``, which appears (or is replaced) in one step at the end.

    force: also build again what the cache holds under the same key.
    """
    plan.builder.check(plan.request)
    plan.builder.check_machine(plan.request)
    _document(plan)  # refuses a folder with other things
    with staged_folder(plan.out) as part:
        stages, files = plan.builder.build(plan.request, part, force=force)
        write_manifest(part, kind=ENGINES_KIND, made_by=plan.command, files=files, facts=_facts(plan, stages))
    return stages


def _document(plan: BuildPlan) -> dict[str, Any] | None:
    """The manifest in ``plan.out``, unchecked; None where nothing is. Raises ConfigError for a foreign folder."""
    if not plan.out.exists() or (plan.out.is_dir() and not any(plan.out.iterdir())):
        return None
    try:
        return read_document(plan.out, kind=ENGINES_KIND, regenerate=plan.command)
    except ArtefactError:
        # Somebody's work: refused here, and so never replaced.
        raise ConfigError(f"{plan.out} holds something else than engines; choose another --out") from None


def _undamaged(plan: BuildPlan) -> list[BuiltStage] | None:
    """The stages in ``plan.out``, with every sha256 checked; None if it is damaged."""
    try:
        document = read_manifest(plan.out, kind=ENGINES_KIND, regenerate=plan.command)
        return [BuiltStage(**entry) for entry in document["stages"]]
    except (ArtefactError, KeyError, TypeError):
        return None


def _facts(plan: BuildPlan, stages: Sequence[BuiltStage]) -> dict[str, Any]:
    model = plan.request.model
    return {
        "digest": plan.digest,
        "target": plan.request.target.name,
        "builder": plan.builder.name,
        "precision": model.precision,
        "versions": {"python": platform.python_version(), **plan.builder.versions()},
        "model": {"name": model.name, "folder": str(model.path), "digest": model.digest},
        "contract": contract_digest(model.specs),
        "options": plan.request.options.facts(),
        **plan.builder.facts(plan.request),
        "stages": [vars(stage) for stage in stages],
    }
