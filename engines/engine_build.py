"""One graph -> one engine, by TensorRT or TensorRT-RTX: parse, check the plugin layers, configure, build."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hstu_trt.contract.errors import ArtefactError, ConfigError, HstuTrtError
from hstu_trt.engines.builders import BuildOptions
from hstu_trt.engines.graphs import StageGraph
from hstu_trt.engines.hooks import BuildLog, make_logger, make_monitor
from hstu_trt.engines.modules import TensorRt
from hstu_trt.engines.profiles import Profile
from hstu_trt.engines.timing_cache import TimingCache

_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """What is to be built."""

    title: str
    """The stage's name, for messages."""
    graph: StageGraph
    profiles: Sequence[Profile]
    options: BuildOptions
    capabilities: tuple[int, ...]
    """Compute capabilities to compile for; none: the GPU at hand."""
    timing_cache: TimingCache | None = None
    quiet: bool = True


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What was built."""

    plan: bytes
    seconds: float
    network_layers: int
    plugin_layers: int
    kernels: int
    """Per profile; 0 where the library prints no list of layers."""
    activation_bytes: tuple[int, ...]
    """Device memory for activations and scratch, per profile, as the build log says."""


def build_engine(trt: TensorRt, job: EngineJob) -> Engine:
    """Builds an engine. Raises ArtefactError for a graph that does not parse as it must, HstuTrtError for a failure."""
    started, log, module = time.perf_counter(), BuildLog(), trt.module
    logger = make_logger(module, log)
    builder = module.Builder(logger)
    # 10.x needs the flag, later versions ignore it; its number differs.
    strongly_typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = module.OnnxParser(network, logger)
    _parse(trt, parser, job)
    plugin_layers = _check_plugins(trt, network, job)
    config = builder.create_builder_config()
    monitor = make_monitor(module, log, job.title, sys.stderr) if not job.quiet else None
    _configure(trt, config, job)
    if monitor is not None:
        config.progress_monitor = monitor
    for profile in job.profiles:
        _add_profile(builder, config, profile, job)
    plan = builder.build_serialized_network(network, config)
    if log.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise HstuTrtError(f"{trt.flavour.title} {trt.version} could not build {job.title}: {_reason(log)}")
    if job.timing_cache is not None:
        job.timing_cache.keep(config)
    return Engine(
        plan=bytes(plan),
        seconds=round(time.perf_counter() - started, 3),
        network_layers=network.num_layers,
        plugin_layers=plugin_layers,
        kernels=log.kernels // len(job.profiles),
        activation_bytes=tuple(log.activation_bytes),
    )


def _reason(log: BuildLog) -> str:
    return log.errors[0].strip().splitlines()[0] if log.errors else "it gave no reason"


def _parse(trt: TensorRt, parser: Any, job: EngineJob) -> None:
    if parser.parse(job.graph.serialized(), str(job.graph.path)):
        return
    errors = "; ".join(parser.get_error(n).desc() for n in range(parser.num_errors)) or "no reason given"
    hint = " (is the plugin library of this version? make plugins)" if job.graph.plugin_layers else ""
    raise ArtefactError(f"{job.graph.path}: the ONNX parser of {trt.flavour.title} {trt.version}: {errors}{hint}")


def _check_plugins(trt: TensorRt, network: Any, job: EngineJob) -> int:
    """The number of plugin layers, which must be that of our op nodes: a body in place of one would be slow."""
    kinds = [network.get_layer(n).type for n in range(network.num_layers)]
    found = sum(kind == trt.module.LayerType.PLUGIN_V3 for kind in kinds)
    if found != job.graph.plugin_layers:
        raise ArtefactError(
            f"{job.title}: the network has {found} plugin layers, the graph has {job.graph.plugin_layers} nodes that "
            "must be plugins; build the library again with `make plugins`, or take --no-plugins for a baseline"
        )
    return found


def _configure(trt: TensorRt, config: Any, job: EngineJob) -> None:
    module, options, flag = trt.module, job.options, trt.module.BuilderFlag
    # Without this the build prints no list of layers, and an inspector names none.
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    flags = {
        flag.TF32: options.tf32,
        flag.REFIT: options.refit,
        flag.STRIP_PLAN: options.strip_plan,
        flag.VERSION_COMPATIBLE: options.version_compatible,
    }
    for name, wanted in flags.items():
        (config.set_flag if wanted else config.clear_flag)(name)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mib * _MIB)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compat != "none":
        level = {"ampere_plus": "AMPERE_PLUS", "same_cc": "SAME_COMPUTE_CAPABILITY"}[options.hardware_compat]
        config.hardware_compatibility_level = getattr(module.HardwareCompatibilityLevel, level)
    if job.capabilities:
        config.num_compute_capabilities = len(job.capabilities)
        for number, capability in enumerate(job.capabilities):
            config.set_compute_capability(getattr(module.ComputeCapability, f"SM{capability}"), number)
    if job.timing_cache is not None:
        job.timing_cache.attach(config)


def _add_profile(builder: Any, config: Any, profile: Profile, job: EngineJob) -> None:
    made = builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        made.set_shape(name, *shapes)
    if config.add_optimization_profile(made) < 0:
        raise ConfigError(f"{job.title}: profile {profile.name} was refused: {dict(profile.shapes)}")
