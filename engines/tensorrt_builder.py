"""The builders ``tensorrt`` and ``tensorrt_rtx``: one class, one path; a flavour says what differs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.manifest import file_sha256, json_digest, read_document
from hstu_trt.contract.model_folder import MODEL_KIND, REGENERATE, TABLES_FOLDER, TAPS, WEIGHTS_FILE
from hstu_trt.engines.attention_memory import fitting_profiles
from hstu_trt.engines.builders import BuildRequest, BuiltStage
from hstu_trt.engines.cuda_driver import current_device
from hstu_trt.engines.engine_build import EngineJob, build_engine
from hstu_trt.engines.graphs import StageGraph, prepare, read_graph, table_bytes
from hstu_trt.engines.modules import Flavour, TensorRt, open_module
from hstu_trt.engines.plan_store import PlanStore, link_or_copy
from hstu_trt.engines.plugin_library import plugin_library, register_plugins, tables_at
from hstu_trt.engines.profiles import DEFAULT_PROFILES, Profile, make_profiles
from hstu_trt.engines.refusals import check_capabilities, check_device, check_options
from hstu_trt.engines.stages import engine_spec, engine_stages
from hstu_trt.engines.targets import find_target
from hstu_trt.engines.timing_cache import TimingCache

SUFFIX = {"tensorrt": ".plan", "tensorrt_rtx": ".engine"}
_NOT_IN_KEY = ("stages", "profiles", "max_table_mib")
"""Options that decide which engines there are, not what is in one; profiles go into a key by their shapes."""
_RECIPE = Path(__file__).with_name("engine_build.py")
"""The code that configures builds: engines in the cache outlive a change of it."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage, ready to be built."""

    stage: str
    graph: StageGraph
    profiles: tuple[Profile, ...]
    notes: tuple[str, ...]
    """What a user should know: profiles that were left out."""


class TensorRtBuilder:
    """Builds each stage of a model into one engine; see ``graphs.py`` for what becomes of plugins and tables."""

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour
        self.name = flavour.name

    def versions(self) -> dict[str, str]:
        trt = self._module()
        return {self.name: trt.version}

    def check(self, request: BuildRequest) -> None:
        check_options(self.flavour, request)

    def check_machine(self, request: BuildRequest) -> None:
        trt = self._module()
        if not self.flavour.on_device:
            check_capabilities(trt, self.capabilities(request))
            return
        check_device(request, current_device())
        if self.with_plugins(request):
            plugin_library()

    def facts(self, request: BuildRequest) -> dict[str, Any]:
        """Compute capabilities; and of a build on the device: GPU, driver and the plugin library."""
        facts: dict[str, Any] = {"compute_capabilities": list(self.capabilities(request))}
        if self.flavour.on_device:
            device = current_device()
            facts |= {"gpu": device.name, "compute_capabilities": [device.compute_capability], "driver": device.driver}
        if self.with_plugins(request):
            library = plugin_library()
            facts["plugins"] = {"file": library.name, "sha256": file_sha256(library)}
        return facts

    def with_plugins(self, request: BuildRequest) -> bool:
        """Whether the custom ops become plugin layers."""
        return self.flavour.on_device and request.options.plugins

    def capabilities(self, request: BuildRequest) -> tuple[int, ...]:
        """Compute capabilities that an engine is compiled for ahead of time; none for a build on the device."""
        if self.flavour.on_device:
            return ()
        targets = (request.target, *(find_target(name) for name in request.options.also))
        return tuple(sorted({target.compute_capability for target in targets}))

    def plan(self, request: BuildRequest) -> tuple[list[StagePlan], list[str]]:
        """The stages to build, and sentences on those left out. Raises ConfigError for one that was asked for."""
        plans, left_out = [], []
        served = tuple(stage for stage in engine_stages(request.model) if stage != TAPS)
        for stage in request.chosen_stages(served):
            source = read_graph(request.model, stage)
            problem = None if self.with_plugins(request) else _too_large(stage, table_bytes(source), request)
            if problem and stage in request.options.stages:
                raise ConfigError(problem)
            if problem:
                left_out.append(problem)
                continue
            graph = prepare(source, request.model.onnx(stage), plugins=self.with_plugins(request))
            plans.append(self._plan_stage(request, stage, graph))
        return plans, left_out

    def build(self, request: BuildRequest, out: Path, *, force: bool) -> tuple[list[BuiltStage], list[str]]:
        trt, facts = self._module(), self.facts(request)
        plans, _ = self.plan(request)
        with ExitStack() as stack:
            if self.with_plugins(request):
                register_plugins(trt)
                stack.enter_context(tables_at(request.model.tables))
            keys = [self._key(trt, request, facts, one) for one in plans]
            stages = [
                (None if force else self._known_stage(request, key, one, out))
                or self._build_stage(trt, request, key, one, out)
                for key, one in zip(keys, plans, strict=True)
            ]
        return stages, [stage.file for stage in stages]

    def _plan_stage(self, request: BuildRequest, stage: str, graph: StageGraph) -> StagePlan:
        spec = engine_spec(request.model, stage)
        profiles = make_profiles(spec, request.model.limits, request.options.profiles or DEFAULT_PROFILES)
        notes: list[str] = []
        if graph.has_dense_attention:
            profiles, notes = fitting_profiles(request, stage, profiles)
        return StagePlan(stage=stage, graph=graph, profiles=tuple(profiles), notes=tuple(notes))

    def _known_stage(self, request: BuildRequest, key: str, one: StagePlan, out: Path) -> BuiltStage | None:
        """A stage whose engine was built before, for this folder or another."""
        found = PlanStore.of(request.cache).find(key)
        if found is None:
            return None
        engine, stage = found
        link_or_copy(engine, out / stage.file)
        return dataclasses.replace(stage, seconds=0.0, details={**stage.details, "notes": list(one.notes)})

    def _build_stage(self, trt: TensorRt, request: BuildRequest, key: str, one: StagePlan, out: Path) -> BuiltStage:
        file = one.stage + SUFFIX[self.name]
        engine = build_engine(trt, self._job(trt, request, one))
        (out / file).write_bytes(engine.plan)
        stage = BuiltStage(
            stage=one.stage,
            file=file,
            bytes=len(engine.plan),
            seconds=engine.seconds,
            key=key,
            details={
                "profiles": [_profile_facts(profile) for profile in one.profiles],
                "notes": list(one.notes),
                "op_nodes": one.graph.op_nodes,
                "network_layers": engine.network_layers,
                "plugin_layers": engine.plugin_layers,
                "kernels": engine.kernels,
                "activation_bytes": list(engine.activation_bytes),
            },
        )
        PlanStore.of(request.cache).keep(out / file, stage)
        return stage

    def _job(self, trt: TensorRt, request: BuildRequest, one: StagePlan) -> EngineJob:
        cache = None
        if self.flavour.on_device:
            cache = TimingCache.of(request.cache / "timing", current_device().name, trt.version)
        return EngineJob(
            title=one.stage,
            graph=one.graph,
            profiles=one.profiles,
            options=request.options,
            capabilities=self.capabilities(request),
            timing_cache=cache,
            quiet=request.quiet,
        )

    def _key(self, trt: TensorRt, request: BuildRequest, facts: Mapping[str, Any], one: StagePlan) -> str:
        """A digest of the graph, the weights and tables in it, and all that decides what is made of them."""
        files = read_document(request.model.path, kind=MODEL_KIND, regenerate=REGENERATE)["files"]
        tables = not self.with_plugins(request)
        outside = {
            name: entry["sha256"]
            for name, entry in files.items()
            if name == WEIGHTS_FILE or (tables and name.startswith(TABLES_FOLDER))
        }
        options = {name: value for name, value in request.options.facts().items() if name not in _NOT_IN_KEY}
        return json_digest(
            {
                "graph": hashlib.sha256(one.graph.serialized()).hexdigest(),
                "outside": outside,
                "version": trt.version,
                "recipe": file_sha256(_RECIPE),
                "facts": {name: value for name, value in facts.items() if name != "driver"},
                "options": options,
                "profiles": [[profile.name, sorted(profile.shapes.items())] for profile in one.profiles],
            }
        )

    def _module(self) -> TensorRt:
        return open_module(self.flavour)


def _profile_facts(profile: Profile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "dims": {name: list(bounds) for name, bounds in profile.dims.items()},
        "shapes": {name: [list(shape) for shape in shapes] for name, shapes in profile.shapes.items()},
    }


def _too_large(stage: str, size: int, request: BuildRequest) -> str | None:
    limit = request.options.max_table_mib
    if size <= limit << 20:
        return None
    return (
        f"{stage} is not built: without plugins its tables ({size / (1 << 20):,.0f} MiB) would become constants of the "
        f"engine, and --max-table-mib is {limit}; look rows up on the host (as the three-stage deployment does), "
        "or build with plugins (--builder tensorrt)"
    )
