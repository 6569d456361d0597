"""``hstu-trt assemble``: triton_repo + an exported model -> a deployment folder for one flavour."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.config_json import config_to_json
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import MANIFEST_NAME, read_document, write_manifest, write_text_atomically
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.staging import staged_folder
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.serving import lint, pbtxt
from hstu_trt.serving.cuda_steps import DEVICES, CudaSettings, place_models, require_servable, use_cuda
from hstu_trt.serving.deployment import (
    DEPLOYMENT_KIND,
    ENGINES_LINK,
    MODEL_LINK,
    REPOSITORY_FOLDER,
    VERSIONS_LINK,
    Deployment,
    read_deployment,
)
from hstu_trt.serving.engine_steps import place_plans, read_engines, use_engines
from hstu_trt.serving.models.waiting_room import BATCHED_PLACES, DEFAULT_PLACES, queue_places
from hstu_trt.serving.refresh.settings import BAD_VERSIONS, DEFAULT_POLL_S, RefreshSettings
from hstu_trt.serving.signature import (
    ATTENTION_NORM,
    FLAVOURS,
    LOOKUP_MODELS,
    MODELS,
    QUEUE_PARAMETER,
    TIERS_PARAMETER,
    signatures,
)
from hstu_trt.tables.ids import POLICIES
from hstu_trt.tables.refresh import REFRESH_MODES
from hstu_trt.tables.tier_settings import FILE as TIERS_FILE
from hstu_trt.tables.tier_settings import TierSettings, read_tier_settings
from hstu_trt.tables.tiers import Tiers

REPOSITORY = Path(__file__).resolve().parents[1] / "triton_repo"
_HEADER = "# Made by hstu-trt assemble from triton_repo/{name}/{file}; edit that one.\n"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a deployment fixes beside the model."""

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
    engines = None if options.engines is None else read_engines(options.engines, model)
    configs = pbtxt.read_repository(REPOSITORY)
    missing = set(MODELS) - set(configs)
    if missing:
        raise ArtefactError(f"{REPOSITORY} lacks the models {', '.join(sorted(missing))}")
    configs = {name: configs[name] for name in MODELS}
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
        if name in LOOKUP_MODELS:
            pbtxt.set_parameter(config, QUEUE_PARAMETER, str(options.places(name)))
        if options.tiers is not None and name in LOOKUP_MODELS:
            pbtxt.set_parameter(config, TIERS_PARAMETER, f"../../{TIERS_FILE}")
        if "refresh" in config.parameters and "refresh_memory_bytes" in parameters:
            pbtxt.set_parameter(config, "refresh_memory_bytes", parameters["refresh_memory_bytes"])
        if name in (ENSEMBLE, FUSED):
            pbtxt.set_parameter(config, "limits", json.dumps(dataclasses.asdict(model.limits)))
    pbtxt.fit_steps(configs[ENSEMBLE], wanted)
    return configs


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
        if options.engines is not None:
            (folder / ENGINES_LINK).symlink_to(options.engines.resolve(), target_is_directory=True)
            place_plans(read_engines(options.engines, model), folder / REPOSITORY_FOLDER)
        if options.flavour == "cuda":
            place_models(folder / REPOSITORY_FOLDER, options.cuda.device)
        lint.require_clean(folder / REPOSITORY_FOLDER, model, options.flavour)
        _write_deployment_manifest(folder, out, model, options)
    return read_deployment(out, verify=False)


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
        made_by=(
            f"hstu-trt assemble --model {model.path} --flavour {options.flavour} --attention-norm {norm} "
            f"--id-policy {options.id_policy} {f'--queue {options.queue} ' if options.queue else ''}"
            f"{f'--engines {options.engines} ' if options.engines else ''}"
            f"{options.cuda.command_text if options.flavour == 'cuda' else ''}"
            f"{f'--tables {options.refresh.tables} ' if options.refresh.tables else ''}"
            f"{'--bad-version previous ' if options.refresh.bad_version == 'previous' else ''}"
            f"{f'--tiers {options.tiers} ' if options.tiers else ''}--out {out}"
        ),
        files=[
            *(path.relative_to(folder).as_posix() for path in repository.rglob("*") if path.is_file()),
            *([TIERS_FILE] if options.tiers else []),
        ],
        facts={
            "flavour": options.flavour,
            "attention_norm": norm,
            "id_policy": options.id_policy,
            "bad_version": options.refresh.bad_version,
            "queue": {name: options.places(name) for name in LOOKUP_MODELS},
            "model": {"name": model.name, "digest": model.digest, "precision": model.precision},
            "limits": dataclasses.asdict(model.limits),
            "versions": {name: metadata.version(name) for name in ("hstu-trt", "tritonclient", "numpy")},
        },
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt assemble", description="Put a Triton deployment together.")
    parser.add_argument("--model", type=Path, required=True, help="model folder, made by hstu-trt export")
    parser.add_argument("--flavour", choices=FLAVOURS, default="cpu", help="how the models run (default: cpu)")
    parser.add_argument("--engines", type=Path, help="flavour tensorrt: folder made by hstu-trt engines")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cuda",
        help="flavour cuda: cpu is plain PyTorch, for tests (default: cuda)",
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=CudaSettings().batch_tokens, metavar="N",
        help="flavour cuda: tokens of a micro-batch (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--attention-norm", metavar="fixed:N", help="N of the attention's 1/N (default: max_seq_len)")
    parser.add_argument("--id-policy", choices=POLICIES, default="reject", help="ids outside a table (default: reject)")
    parser.add_argument(
        "--queue", type=int, metavar="N",
        help=f"requests that may wait, per model (default: {DEFAULT_PLACES}, {BATCHED_PLACES} for batches on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--tiers", type=Path, metavar="FILE", help="tiers of the tables, as tables.json says (default: mapped files)"
    )
    parser.add_argument("--tables", type=Path, metavar="DIR", help="folder of versions of the tables, watched")
    parser.add_argument(
        "--refresh", choices=REFRESH_MODES, default="auto", help="versions side by side or as overlays (default: auto)"
    )
    parser.add_argument(
        "--refresh-memory", type=float, metavar="GB", help="rows in memory, per process (default: free)"
    )
    parser.add_argument("--refresh-poll", type=float, default=DEFAULT_POLL_S, help="seconds between looks (default: 1)")
    parser.add_argument(
        "--bad-version", choices=BAD_VERSIONS, default="refuse",
        help="a start that cannot serve the version in use ends, or serves the one before it (default: refuse)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="deployment folder to write")
    parser.add_argument("--dry-run", action="store_true", help="print the difference to the repository, write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """The ``assemble`` verb."""
    args = _parser().parse_args(argv)
    refresh = RefreshSettings(
        tables=args.tables,
        mode=args.refresh,
        memory_bytes=None if args.refresh_memory is None else int(args.refresh_memory * 1e9),
        poll_s=args.refresh_poll,
        bad_version=args.bad_version,
    )
    options = Options(
        flavour=args.flavour,
        engines=args.engines,
        attention_norm=args.attention_norm,
        id_policy=args.id_policy,
        queue=args.queue,
        tiers=args.tiers,
        refresh=refresh,
        cuda=CudaSettings(device=args.device, batch_tokens=args.batch_tokens),
    )
    model = read_model_folder(args.model)
    if args.dry_run:
        return _print_differences(model, options, as_json=args.json)
    deployment = assemble(model, args.out, options)
    if args.json:
        print(json.dumps(_summary(deployment)))
    else:
        _print_deployment(deployment, args.out)
    return 0


def _print_differences(model: ModelFolder, options: Options, *, as_json: bool) -> int:
    before = pbtxt.read_repository(REPOSITORY)
    fitted = fitted_configs(model, options)
    differences = {name: pbtxt.difference(name, before[name], config) for name, config in fitted.items()}
    print(json.dumps(differences) if as_json else "\n".join(filter(None, differences.values())))
    return 0


def _summary(deployment: Deployment) -> dict[str, Any]:
    return {
        "deployment": str(deployment.path),
        "manifest": str(deployment.path / MANIFEST_NAME),
        "models": list(MODELS),
        "flavour": deployment.flavour,
        "attention_norm": deployment.attention_norm,
        "id_policy": deployment.id_policy,
        "model": deployment.model.name,
        "precision": deployment.model.precision,
    }


def _print_deployment(deployment: Deployment, out: Path) -> None:
    model = deployment.model
    print(f"assembled {out} ({deployment.flavour}) from {model.name} {model.precision}")
    print(f"  models          {', '.join(MODELS)}")
    print(f"  attention norm  {deployment.attention_norm}")
    print(f"  ids             {deployment.id_policy} those outside a table")
    print(f"serve it with: hstu-trt serve --deployment {shlex.quote(os.path.relpath(out))}")


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt assemble"))
