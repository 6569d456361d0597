"""A deployment on disk: what ``assemble`` writes and ``serve`` launches.

DIR/
  manifest.json    kind "deployment": what is served, flavour, attention norm, id policy, digest of the model, sha256
                   of each file
  model            link to the exported model folder (``contract/model_folder.py``)
  engines          flavour ``tensorrt``: link to the engines folder
  tables.json      where tables are that are not mapped files, and how to reach them (``tables/tier_settings.py``)
  tables           link to the folder of versions that is watched, if any (``releases.py``)
  canary.json      with one served model: the scores that a server must begin with (``reference_answer.py``)
  models/          the Triton model repository
  run/             written by ``serve``: Triton's backends folder, the server's log, events and what it serves
                   (``held.py``, ``events.py``); ``serve --run`` names another folder, and the deployment is only read
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_manifest
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.serving.model_code import check_model_code
from hstu_trt.serving.served import SERVED, known_served, lookups_of
from hstu_trt.tables.tier_settings import FILE as TIERS_FILE
from hstu_trt.tables.tier_settings import TierSettings, read_tier_settings

DEPLOYMENT_KIND = "deployment"
MODEL_LINK = "model"
ENGINES_LINK = "engines"
VERSIONS_LINK = "tables"
REPOSITORY_FOLDER = "models"
RUN_FOLDER = "run"
RUN_VARIABLE = "HSTU_TRT_RUN"
"""Environment variable by which ``serve`` tells the models where its run folder is."""
REGENERATE = "hstu-trt assemble --model DIR --flavour cpu --attention-norm fixed:N --out {folder}"


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A deployment whose files have been checked."""

    path: Path
    model: ModelFolder
    flavour: str
    attention_norm: str
    id_policy: str
    served: tuple[str, ...] = SERVED
    """The models that requests may come to (``served.py``)."""
    queue: Mapping[str, int]
    """Requests that may wait, by model where they come in."""
    bad_version: str = "refuse"
    """``RefreshSettings.bad_version``."""
    tiers: TierSettings = field(default_factory=TierSettings)
    run_folder: Path | None = None
    """None: in the deployment."""

    @property
    def kind_text(self) -> str:
        """Its flavour, and whether it serves one model alone: what figures of two deployments must share."""
        return self.flavour if len(self.served) > 1 else f"{self.flavour} {self.served[0]} alone"

    @property
    def repository(self) -> Path:
        return self.path / REPOSITORY_FOLDER

    @property
    def versions(self) -> Path:
        return self.path / VERSIONS_LINK

    @property
    def run(self) -> Path:
        return self.run_folder or self.path / RUN_FOLDER


def run_folder_of_model(model_repository: Path) -> Path:
    """The run folder of the server that serves a model from ``DIR/models/NAME``."""
    return Path(os.environ.get(RUN_VARIABLE) or (model_repository / "../.." / RUN_FOLDER).resolve())


def read_deployment(folder: Path, *, verify: bool = True) -> Deployment:
    """Reads a deployment and checks its files, and those of its model (with sha256 unless ``verify`` is off).

    Raises ArtefactError when something is missing, damaged, the model was exported anew since, or the models were made
    for another version of this package.
    """
    folder = folder.resolve()
    regenerate = REGENERATE.format(folder=folder)
    document = read_manifest(folder, kind=DEPLOYMENT_KIND, regenerate=regenerate, verify=verify)
    link = folder / MODEL_LINK
    if not link.exists():
        raise ArtefactError(
            f"{link} leads nowhere: its model folder {link.resolve()} was moved or deleted; "
            f"make it again with: {regenerate}"
        )
    model = read_model_folder(link.resolve(), verify=verify)
    try:
        served = _served_of(document, folder)
        deployment = Deployment(
            path=folder,
            model=model,
            flavour=document["flavour"],
            attention_norm=document["attention_norm"],
            id_policy=document["id_policy"],
            served=served,
            bad_version=document.get("bad_version", "refuse"),
            queue={name: document["queue"][name] for name in lookups_of(served)},
            tiers=read_tier_settings(folder / TIERS_FILE) if TIERS_FILE in document["files"] else TierSettings(),
        )
        digest = document["model"]["digest"]
    except (KeyError, TypeError) as error:
        raise ArtefactError(f"{folder}: its manifest lacks {error}; make it again with: {regenerate}") from None
    if digest != model.digest:
        raise ArtefactError(
            f"{folder} was assembled for another export of {model.path}; "
            f"make it again with: {document.get('made_by', regenerate)}"
        )
    check_model_code(deployment.repository, str(document.get("made_by", regenerate)))
    return deployment


def _served_of(document: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """What a manifest says is served; one without a word is of a version that always served both."""
    try:
        return known_served(document.get("served", SERVED))
    except (ConfigError, TypeError) as error:
        raise ArtefactError(
            f"{folder}: 'served' in its manifest: {error}; make it again with: {REGENERATE.format(folder=folder)}"
        ) from None
