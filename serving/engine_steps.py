"""The flavour ``tensorrt``: which steps of the repository become TensorRT plans, and what that changes around them.

``hstu`` and ``mlp_head`` run in Triton's TensorRT backend. ``embedding_lookup`` stays a Python model over the host
tables; it sees the whole request, since plans check nothing, and hands the attention norm on. ``ranking_fused`` stays a
Python model too, which batches users and runs the fused engine: Triton cannot cut a ragged [candidates, tasks] output.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import read_manifest
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.engines.cuda_driver import current_device
from hstu_trt.engines.engine_folder import check_engine, read_engine_file
from hstu_trt.engines.modules import TENSORRT, open_module
from hstu_trt.serving import pbtxt
from hstu_trt.serving.deployment import ENGINES_LINK, Deployment
from hstu_trt.serving.signature import ATTENTION_NORM, ENGINE_STEPS, Signature
from hstu_trt.tables.tier_settings import FILE as TIERS_FILE

PLAN_FILE = "model.plan"
ENGINES_PARAMETER = "engines"
_KIND = "engines"
_BUILDER = "tensorrt"
_REGENERATE = "hstu-trt engines --model DIR --gpu NAME --precision P --builder tensorrt --out {folder}"


@dataclass(frozen=True, kw_only=True)
class ServedEngines:
    """An engines folder whose files have been checked."""

    path: Path
    plans: Mapping[str, Path]
    """Stage -> its plan."""
    profiles: Mapping[str, int]
    """Stage -> number of its optimisation profiles."""


def stages_of(served: Sequence[str], *, has_tiers: bool) -> tuple[str, ...]:
    """The stages whose engines a deployment runs.

    has_tiers: then ``ranking_fused`` looks rows up on the host, and runs the engines of the steps.
    """
    steps = ENGINE_STEPS if ENSEMBLE in served or has_tiers else ()
    return (*steps, *((FUSED,) if FUSED in served and (ENSEMBLE in served or not has_tiers) else ()))


def read_engines(folder: Path, model: ModelFolder, needed: Sequence[str] = (*ENGINE_STEPS, FUSED)) -> ServedEngines:
    """The plans of a folder that were built from ``model``, among them those of needed stages. Raises ArtefactError."""
    regenerate = _REGENERATE.format(folder=folder)
    document = read_manifest(folder, kind=_KIND, regenerate=regenerate)
    try:
        builder, digest = document["builder"], document["model"]["digest"]
        stages = {entry["stage"]: entry for entry in document["stages"]}
        plans = {stage: folder / entry["file"] for stage, entry in stages.items()}
        profiles = {stage: len(entry.get("details", {}).get("profiles", ())) or 1 for stage, entry in stages.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{folder}: its manifest is malformed ({error!r}); make it with: {regenerate}") from None
    if builder != _BUILDER:
        raise ArtefactError(
            f"{folder} holds engines of builder {builder!r}; Triton's backend runs those of {_BUILDER!r}; "
            f"make them with: {regenerate}"
        )
    if digest != model.digest:
        raise ArtefactError(f"{folder} was built from another export than {model.path}; make it with: {regenerate}")
    missing = [stage for stage in needed if stage not in plans]
    if missing:
        raise ArtefactError(f"{folder} has no engine of {', '.join(missing)}; make them with: {regenerate}")
    return ServedEngines(path=folder, plans=plans, profiles=profiles)


def check_engines(deployment: Deployment) -> None:
    """The engines of a deployment against their digests, the GPU here, and its TensorRT.

    Triton would tell of another GPU or version by a number from inside TensorRT, after it has loaded the other models.
    Raises ArtefactError, or ConfigError where there is no GPU or no TensorRT.
    """
    trt, device = open_module(TENSORRT), current_device()
    folder = (deployment.path / ENGINES_LINK).resolve()
    stages = stages_of(deployment.served, has_tiers=(deployment.path / TIERS_FILE).is_file())
    for place, stage in enumerate(stages):
        check_engine(read_engine_file(folder, stage, deployment.model, verify=place == 0), trt, device)


def use_engines(
    configs: Mapping[str, pbtxt.ModelConfig], wanted: Mapping[str, Signature], engines: ServedEngines
) -> None:
    """Turns the steps of the repository into plans, in place."""
    for step in (step for step in ENGINE_STEPS if step in configs):
        config = configs[step]
        config.backend, config.platform = "", "tensorrt_plan"
        config.default_model_filename = PLAN_FILE
        config.parameters.clear()
        del config.instance_group[:]
        numbers = [str(number) for number in range(engines.profiles[step])]
        config.instance_group.add(kind="KIND_GPU", count=1, gpus=[0], profile=numbers)
    if FUSED in configs:
        pbtxt.set_parameter(configs[FUSED], ENGINES_PARAMETER, f"../../{ENGINES_LINK}")
    if ENSEMBLE in configs:
        send_through_lookup(configs, wanted)


def send_through_lookup(configs: Mapping[str, pbtxt.ModelConfig], wanted: Mapping[str, Signature]) -> None:
    """The whole request goes to ``embedding_lookup``, which hands the attention norm on. In place."""
    for name in ("embedding_lookup", *ENGINE_STEPS):
        pbtxt.add_ports(configs[name], wanted[name])
    pbtxt.set_parameter(configs["embedding_lookup"], ATTENTION_NORM, "")
    lookup, hstu, _ = configs[ENSEMBLE].ensemble_scheduling.step
    for port in configs[ENSEMBLE].input:
        lookup.input_map[port.name] = port.name
    lookup.output_map[ATTENTION_NORM] = hstu.input_map[ATTENTION_NORM] = ATTENTION_NORM


def place_plans(engines: ServedEngines, repository: Path) -> None:
    """Copies the plans to where Triton reads them, in place of the Python models."""
    for step in (step for step in ENGINE_STEPS if (repository / step).is_dir()):
        version = repository / step / "1"
        (version / "model.py").unlink(missing_ok=True)
        shutil.copyfile(engines.plans[step], version / PLAN_FILE)
