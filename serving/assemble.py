"""triton_repo + an exported model -> a deployment folder for one flavour (``assemble_command.py``)."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.config_json import config_to_json
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_document, write_manifest, write_text_atomically
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.serving import lint, pbtxt, reference_answer
from hstu_trt.serving.cuda_steps import CudaSettings, place_models, require_servable, use_cuda
from hstu_trt.serving.deployment import (
    DEPLOYMENT_KIND,
    ENGINES_LINK,
    MODEL_LINK,
    REPOSITORY_FOLDER,
    VERSIONS_LINK,
    Deployment,
    read_deployment,
)
from hstu_trt.serving.engine_steps import ServedEngines, place_plans, read_engines, stages_of, use_engines
from hstu_trt.serving.models.waiting_room import BATCHED_PLACES, DEFAULT_PLACES, queue_places
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.served import LOOKUP_MODELS, SERVED, known_served, lookups_of, models_of
from hstu_trt.serving.signature import (
    ATTENTION_NORM,
    FLAVOURS,
    QUEUE_PARAMETER,
    TIERS_PARAMETER,
    signatures,
)
from hstu_trt.tables.ids import POLICIES
from hstu_trt.tables.tier_settings import FILE as TIERS_FILE
from hstu_trt.tables.tier_settings import TierSettings, read_tier_settings
from hstu_trt.tables.tiers import Tiers

REPOSITORY = Path(__file__).resolve().parents[1] / "triton_repo"
_HEADER = "# Made by hstu-trt assemble from triton_repo/{name}/{file}; edit that one.\n"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a deployment fixes beside the model."""

    served: tuple[str, ...] = SERVED
    """The models that requests may come to; nothing is placed that only others need."""
    flavour: str = "cpu"
    engines: Path | None = None
    """Flavour ``tensorrt``: the folder that ``hstu-trt engines`` wrote."""
    attention_norm: str | None = None
    """``fixed:N``; None means the model's ``max_seq_len``."""
    id_policy: str = "reject"
    queue: int | None = None
    """Requests that may wait in front of ``ranking``, and of ``ranking_fused``; None: ``waiting_room.py`` decides.

    Flavour ``cuda``: ``ranking`` has no bound without the guard (``cuda_models.py``).
    """
    tiers: Path | None = None
    """Settings of the tables' tiers; None: all are mapped files."""
    refresh: RefreshSettings = field(default_factory=RefreshSettings)
    cuda: CudaSettings = field(default_factory=CudaSettings)
    """Flavour ``cuda``."""

    def __post_init__(self) -> None:
        known_served(self.served)
        if self.flavour not in FLAVOURS:
            raise ConfigError(f"unknown flavour {self.flavour!r}: choose from {', '.join(FLAVOURS)}")
        if (self.flavour == "tensorrt") != (self.engines is not None):
            raise ConfigError("--engines goes with --flavour tensorrt, and that flavour needs it")
        if self.flavour == "cuda":
            self._require_fixed_tables()
        elif self.cuda != CudaSettings():
            raise ConfigError("--device and --batch-tokens go with --flavour cuda")
        if self.id_policy not in POLICIES:
            raise ConfigError(f"unknown id policy {self.id_policy!r}: choose from {', '.join(POLICIES)}")
        if self.queue is not None:
            queue_places(str(self.queue))
        if self.attention_norm is not None:
            parse_fixed_norm(self.attention_norm)

    def _require_fixed_tables(self) -> None:
        why = "the flavour cuda holds the model's own tables in GPU memory from the start to the end"
        if self.tiers is not None:
            raise ConfigError(f"--tiers: {why}; take --flavour cpu for tables in other tiers")
        if self.refresh != RefreshSettings():
            raise ConfigError(f"--tables and --refresh: {why}; take --flavour cpu to follow published versions")

    def places(self, name: str) -> int:
        """Requests that may wait in front of a model."""
        batched = self.flavour != "cpu" and name == FUSED
        return self.queue or (BATCHED_PLACES if batched else DEFAULT_PLACES)

    def norm_text(self, model: ModelFolder) -> str:
        """The attention norm of the deployment, as ``fixed:N``."""
        return self.attention_norm or f"fixed:{model.ranking_config.max_seq_len}"


def fitted_configs(model: ModelFolder, options: Options) -> dict[str, pbtxt.ModelConfig]:
    """The repository's configs with the model's widths, dtypes, inputs and parameters. Raises ArtefactError."""
    engines = _engines_of(model, options)
    configs = pbtxt.read_repository(REPOSITORY)
    names = models_of(options.served)
    missing = set(names) - set(configs)
    if missing:
        raise ArtefactError(f"{REPOSITORY} lacks the models {', '.join(sorted(missing))}")
    configs = {name: configs[name] for name in names}
    wanted = signatures(model.ranking_config, model.limits, model.precision, options.flavour)
    if engines is not None:
        use_engines(configs, wanted, engines)
    if options.flavour == "cuda":
        require_servable(model)
        use_cuda(configs, wanted, options.cuda)
    parameters = {
        "id_policy": options.id_policy,
        ATTENTION_NORM: options.norm_text(model),
        "config": json.dumps(config_to_json(model.ranking_config)),
        **options.refresh.parameters(),
    }
    for name, config in configs.items():
        pbtxt.fit(config, wanted[name])
        for key in parameters.keys() & set(config.parameters):
            pbtxt.set_parameter(config, key, parameters[key])
        if "refresh" in config.parameters and "refresh_memory_bytes" in parameters:
            pbtxt.set_parameter(config, "refresh_memory_bytes", parameters["refresh_memory_bytes"])
        _set_own_parameters(name, config, model, options)
    if ENSEMBLE in configs:
        pbtxt.fit_steps(configs[ENSEMBLE], wanted)
    return configs


def _set_own_parameters(name: str, config: pbtxt.ModelConfig, model: ModelFolder, options: Options) -> None:
    """Those that the model alone has, where requests come in or rows are looked up."""
    if name in LOOKUP_MODELS:
        pbtxt.set_parameter(config, QUEUE_PARAMETER, str(options.places(name)))
        if options.tiers is not None:
            pbtxt.set_parameter(config, TIERS_PARAMETER, f"../../{TIERS_FILE}")
    if name in options.served:
        pbtxt.set_parameter(config, "limits", json.dumps(dataclasses.asdict(model.limits)))


def assemble(model: ModelFolder, out: Path, options: Options) -> Deployment:
    """Writes the deployment folder, lints it and returns it. Raises ArtefactError, or GateError from the lint."""
    _refuse_foreign_folder(out)
    configs = fitted_configs(model, options)
    tiers = None if options.tiers is None else _tiers_of(model, options.tiers)
    with staged_folder(out) as folder:
        (folder / MODEL_LINK).symlink_to(model.path.resolve(), target_is_directory=True)
        if options.refresh.tables is not None:
            (folder / VERSIONS_LINK).symlink_to(options.refresh.tables.resolve(), target_is_directory=True)
        for name, config in configs.items():
            _write_model(REPOSITORY / name, folder / REPOSITORY_FOLDER / name, config)
        if tiers is not None:
            write_text_atomically(folder / TIERS_FILE, json.dumps(tiers.to_json(), indent=2) + "\n")
        if options.engines is not None and (engines := _engines_of(model, options)) is not None:
            (folder / ENGINES_LINK).symlink_to(options.engines.resolve(), target_is_directory=True)
            place_plans(engines, folder / REPOSITORY_FOLDER)
        if options.flavour == "cuda":
            place_models(folder / REPOSITORY_FOLDER, options.cuda.device)
        lint.require_clean(folder / REPOSITORY_FOLDER, model, options.flavour, options.served)
        if len(options.served) == 1 and (tiers is None or not tiers.may_lack_rows):
            reference_answer.write_reference(folder, model, options.norm_text(model))
        _write_deployment_manifest(folder, out, model, options)
    return read_deployment(out, verify=False)


def _engines_of(model: ModelFolder, options: Options) -> ServedEngines | None:
    """The engines that the deployment runs. Raises ArtefactError."""
    if options.engines is None:
        return None
    return read_engines(options.engines, model, stages_of(options.served, has_tiers=options.tiers is not None))


def _tiers_of(model: ModelFolder, path: Path) -> TierSettings:
    """Settings that fit the model's tables. Raises ArtefactError or ConfigError."""
    settings = read_tier_settings(path)
    Tiers(settings).read_folder(current_tables(model.tables))
    return settings


def _refuse_foreign_folder(out: Path) -> None:
    """A deployment is replaced, anything else is kept."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        read_document(out, kind=DEPLOYMENT_KIND, regenerate="")
    except ArtefactError:
        raise ConfigError(f"{out} exists and is not a deployment; choose another --out") from None


def _write_model(source: Path, target: Path, config: pbtxt.ModelConfig) -> None:
    header = _HEADER.format(name=source.name, file=pbtxt.CONFIG_FILE)
    write_text_atomically(target / pbtxt.CONFIG_FILE, header + pbtxt.config_text(config))
    for version in (path for path in source.iterdir() if path.is_dir() and path.name.isdecimal()):
        shutil.copytree(version, target / version.name, ignore=shutil.ignore_patterns("__pycache__"))


def _write_deployment_manifest(folder: Path, out: Path, model: ModelFolder, options: Options) -> None:
    norm = options.norm_text(model)
    repository = folder / REPOSITORY_FOLDER
    write_manifest(
        folder,
        kind=DEPLOYMENT_KIND,
        made_by=_command(model, out, options),
        files=[
            *(path.relative_to(folder).as_posix() for path in repository.rglob("*") if path.is_file()),
            *(name for name in (TIERS_FILE, reference_answer.FILE) if (folder / name).is_file()),
        ],
        facts={
            "served": list(options.served),
            "flavour": options.flavour,
            "attention_norm": norm,
            "id_policy": options.id_policy,
            "bad_version": options.refresh.bad_version,
            "queue": {name: options.places(name) for name in lookups_of(options.served)},
            "model": {"name": model.name, "digest": model.digest, "precision": model.precision},
            "limits": dataclasses.asdict(model.limits),
            "versions": {name: metadata.version(name) for name in ("hstu-trt", "tritonclient", "numpy")},
        },
    )


def _command(model: ModelFolder, out: Path, options: Options) -> str:
    """What makes the same deployment again, for a shell; options that are not given are left out."""
    given: dict[str, object] = {
        "--model": model.path,
        "--served": None if options.served == SERVED else ",".join(options.served),
        "--flavour": options.flavour,
        "--attention-norm": options.norm_text(model),
        "--id-policy": options.id_policy,
        "--queue": options.queue,
        "--engines": options.engines,
        **(options.cuda.command_options() if options.flavour == "cuda" else {}),
        "--tiers": options.tiers,
        **options.refresh.command_options(),
        "--out": out,
    }
    words = [str(word) for option, value in given.items() if value is not None for word in (option, value)]
    return shlex.join(["hstu-trt", "assemble", *words])
