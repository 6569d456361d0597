"""Reading an engines folder back: which engine a stage has, and whether it may run here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import read_manifest
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.engines.cuda_driver import Device
from hstu_trt.engines.graphs import prepare, read_graph
from hstu_trt.engines.modules import FLAVOURS, TensorRt, version_numbers
from hstu_trt.engines.plugin_library import register_plugins, tables_at
from hstu_trt.engines.profiles import Profile
from hstu_trt.engines.targets import AMPERE, capability_text

ENGINES_KIND = "engines"
_BUILD = "hstu-trt engines --model {model} --gpu GPU --precision {precision} --out {folder}"


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """An engine, and what its manifest says of it."""

    path: Path
    stage: str
    builder: str
    version: str
    """Of the library that built it."""
    capabilities: tuple[int, ...]
    has_plugins: bool
    parsed_for_plugins: bool
    """Whether the graph that was parsed left functions and tables out; true of a stage without any op, too."""
    stripped: bool
    version_compatible: bool
    any_ampere: bool
    """Runs on every GPU from compute capability 8.0 on."""
    profiles: tuple[Profile, ...]
    command: str
    """What builds it again."""


def read_engine_file(folder: Path, stage: str, model: ModelFolder, *, verify: bool = True) -> EngineFile:
    """Finds a stage's engine and checks every sha256, unless ``verify`` is off.

    Raises ArtefactError for a missing, stale or foreign one.
    """
    build = _BUILD.format(model=model.path, precision=model.precision, folder=folder)
    document = read_manifest(folder, kind=ENGINES_KIND, regenerate=build, verify=verify)
    command = str(document.get("made_by", build))
    if str(document.get("builder")) not in FLAVOURS:
        raise ArtefactError(
            f"{folder} holds no TensorRT engines but those of {document.get('builder')}; build: {build}"
        )
    try:
        if document["model"]["digest"] != model.digest:
            raise ArtefactError(
                f"{folder} was built from another export than {model.path}; build it again with: {command}"
            )
        entries = {entry["stage"]: entry for entry in document["stages"]}
        if stage not in entries:
            raise ArtefactError(
                f"{folder} has no engine for stage {stage}, but for {', '.join(entries)}; add --stages to: {command}"
            )
        details, options, file = entries[stage]["details"], document["options"], entries[stage]["file"]
        if file not in document["files"]:  # nobody has hashed it, and a plan may run code
            raise ArtefactError(f"{folder}: {file!r} is not among the manifest's files; build it again with: {command}")
        return EngineFile(
            path=folder / file,
            stage=stage,
            builder=document["builder"],
            version=document["versions"][document["builder"]],
            capabilities=tuple(document["compute_capabilities"]),
            has_plugins=details["plugin_layers"] > 0,
            parsed_for_plugins=FLAVOURS[document["builder"]].on_device and options.get("plugins", True),
            stripped=options.get("strip_plan", False),
            version_compatible=options.get("version_compatible", False),
            any_ampere=options.get("hardware_compat") == "ampere_plus",
            profiles=tuple(_profile(facts) for facts in details["profiles"]),
            command=command,
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ArtefactError(
            f"{folder}: its manifest is malformed ({error!r}); build it again with: {command}"
        ) from None


def _profile(facts: dict[str, Any]) -> Profile:
    return Profile(
        name=facts["name"],
        dims={name: (bounds[0], bounds[1], bounds[2]) for name, bounds in facts["dims"].items()},
        shapes={name: (tuple(s[0]), tuple(s[1]), tuple(s[2])) for name, s in facts["shapes"].items()},
    )


def check_engine(file: EngineFile, trt: TensorRt, device: Device) -> None:
    """Refuses an engine of another version or for another GPU. Raises ArtefactError."""
    if file.builder != trt.flavour.name:
        raise ArtefactError(f"{file.path} was built by {file.builder}, not {trt.flavour.name}: take that runner")
    built, here = version_numbers(file.version), version_numbers(trt.version)
    newer = file.version_compatible and built[0] == here[0] and built <= here
    if built != here and not newer:
        raise ArtefactError(
            f"{file.path} was built by {trt.flavour.title} {file.version}, {trt.version} is installed; install "
            f"{trt.flavour.package}=={file.version}, or build it again with: {file.command}"
        )
    ampere = file.any_ampere and device.compute_capability >= AMPERE
    if device.compute_capability not in file.capabilities and not ampere:
        wanted = ", ".join(map(capability_text, file.capabilities))
        raise ArtefactError(
            f"{file.path} is for compute capability {wanted}; the GPU here is {device.name} "
            f"({capability_text(device.compute_capability)}); build engines for it: hstu-trt engines --gpu"
        )


def open_engine(trt: TensorRt, logger: Any, file: EngineFile, model: ModelFolder) -> tuple[Any, Any]:
    """Runtime and engine; loads the plugin library, and puts weights back into a stripped plan.

    A version-compatible plan executes code of its own: open only folders from a trusted source.
    """
    with _tables(file, model):
        if file.has_plugins:
            register_plugins(trt)
        runtime = trt.module.Runtime(logger)
        # A version-compatible plan carries the runtime of its version: code that runs in this process. The manifest
        # finds damage, not malice, for whoever can write the plan can write its sha256: the folder must be trusted.
        runtime.engine_host_code_allowed = file.version_compatible
        engine = runtime.deserialize_cuda_engine(file.path.read_bytes())
        if engine is None:
            raise ArtefactError(f"{file.path}: {trt.flavour.title} cannot load it; build it again with: {file.command}")
        if file.stripped:
            _refit(trt, logger, engine, file, model)
    return runtime, engine


def make_context(trt: TensorRt, engine: Any, file: EngineFile, model: ModelFolder) -> Any:
    """An execution context of an engine; None where TensorRT refuses, and says why in its log.

    The lookup plugin opens its tables here, in the folder of ``model``.
    """
    strategy = trt.module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    with _tables(file, model):
        return engine.create_execution_context(strategy)


def _tables(file: EngineFile, model: ModelFolder) -> AbstractContextManager[None]:
    return tables_at(model.tables) if file.has_plugins else nullcontext()


def _refit(trt: TensorRt, logger: Any, engine: Any, file: EngineFile, model: ModelFolder) -> None:
    refitter = trt.module.Refitter(engine, logger)
    graph = prepare(read_graph(model, file.stage), model.onnx(file.stage), plugins=file.parsed_for_plugins)
    parser = trt.module.OnnxParserRefitter(refitter, logger)
    if not (parser.refit_from_bytes(graph.serialized(), str(graph.path)) and refitter.refit_cuda_engine()):
        raise ArtefactError(
            f"{file.path}: weights of {graph.path} do not fit into the plan; build it again: {file.command}"
        )
