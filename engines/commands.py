"""The command lines that come nearest: ours, trtexec's and Polygraphy's.

They take the exported file as it is, our builders a prepared graph; ``report.py`` notes what that makes different:
tables inside the plan, and fp8 models whose function bodies no parser was seen to take.

Options as in trtexec of TensorRT 10.15 to 11.1 (samples/common/sampleOptions.cpp of NVIDIA/TensorRT) and Polygraphy
0.53. TensorRT-RTX has no trtexec.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.plugin_files import AUTOLOAD_LIBRARY, PLUGIN_LIBRARY
from hstu_trt.engines.builders import BuildOptions, BuildRequest
from hstu_trt.engines.modules import Flavour
from hstu_trt.engines.profiles import Profile, Shape
from hstu_trt.engines.targets import capability_text

_LIBRARIES = Path("build/lib")


def engines_command(request: BuildRequest, builder: str, out: Path) -> str:
    """The command that builds it again."""
    options, model = request.options, request.model
    words = ["hstu-trt", "engines", "--model", str(model.path), "--gpu", request.target.name]
    words += ["--precision", model.precision]
    words += ["--builder", builder] if builder != request.target.builders[0] else []
    for name, value in options.facts().items():
        words += _option(name, value)
    return shlex.join([*words, "--out", str(out)])


def _option(name: str, value: object) -> list[str]:
    option = {"plugins": "--no-plugins", "optimization_level": "--opt-level", "profiles": "--profile"}.get(
        name, "--" + name.replace("_", "-")
    )
    if isinstance(value, bool):
        return [option]
    if name == "profiles":
        return [word for text in value for word in (option, text)]  # type: ignore[attr-defined]
    return [option, ",".join(value) if isinstance(value, list) else str(value)]


@dataclass(frozen=True, kw_only=True)
class EngineInputs:
    """What one engine is made of, beside the options."""

    source: Path
    """The exported .onnx file."""
    engine: Path
    profiles: tuple[Profile, ...]
    capabilities: tuple[int, ...]
    """Compute capabilities to compile for ahead of time."""
    has_plugins: bool


def equivalent_commands(flavour: Flavour, options: BuildOptions, inputs: EngineInputs) -> list[str]:
    """Lines of a shell that build from the exported file, with the same options."""
    line = shlex.join(_polygraphy(flavour, options, inputs))
    if flavour.on_device:
        return [shlex.join(_trtexec(options, inputs)), line]
    return [f"POLYGRAPHY_USE_TENSORRT_RTX=1 {line}"]


def _trtexec(options: BuildOptions, inputs: EngineInputs) -> list[str]:
    words = [
        "trtexec",
        f"--onnx={inputs.source}",
        f"--saveEngine={inputs.engine}",
        "--stronglyTyped",
        "--skipInference",
    ]
    words += [f"--dynamicPlugins={_LIBRARIES / PLUGIN_LIBRARY}"] * inputs.has_plugins
    words += ["--profilingVerbosity=detailed", *["--noTF32"] * (not options.tf32)]
    words += ["--refit"] * options.refit + ["--stripWeights"] * options.strip_plan
    words += ["--versionCompatible"] * options.version_compatible
    if options.hardware_compat != "none":
        level = {"ampere_plus": "ampere+", "same_cc": "sameComputeCapability"}[options.hardware_compat]
        words.append(f"--hardwareCompatibilityLevel={level}")
    if options.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={options.optimization_level}")
    if options.workspace_mib is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace_mib}M")
    for number, profile in enumerate(inputs.profiles):
        words.append(f"--profile={number}")
        for at, kind in enumerate(("min", "opt", "max")):
            shapes = ",".join(f"{name}:{'x'.join(map(str, shape[at]))}" for name, shape in profile.shapes.items())
            words.append(f"--{kind}Shapes={shapes}")
    return words


def _polygraphy(flavour: Flavour, options: BuildOptions, inputs: EngineInputs) -> list[str]:
    words = ["polygraphy", "convert", str(inputs.source), "--convert-to", "trt", "--strongly-typed"]
    words += ["--profiling-verbosity", "detailed", *["--tf32"] * options.tf32]
    words += ["--plugins", str(_LIBRARIES / AUTOLOAD_LIBRARY)] * inputs.has_plugins
    if not flavour.on_device:
        words += ["--compute-capabilities", *map(capability_text, inputs.capabilities)]
    words += ["--refittable"] * options.refit + ["--strip-plan"] * options.strip_plan
    words += ["--version-compatible"] * options.version_compatible
    if options.hardware_compat != "none":
        level = {"ampere_plus": "ampere_plus", "same_cc": "same_compute_capability"}[options.hardware_compat]
        words += ["--hardware-compatibility-level", level]
    if options.optimization_level is not None:
        words += ["--builder-optimization-level", str(options.optimization_level)]
    if options.workspace_mib is not None:
        words += ["--pool-limit", f"workspace:{options.workspace_mib}M"]
    for profile in inputs.profiles:
        for at, kind in enumerate(("min", "opt", "max")):
            words += [f"--trt-{kind}-shapes", *(_polygraphy_shape(name, s[at]) for name, s in profile.shapes.items())]
    return [*words, "-o", str(inputs.engine)]


def _polygraphy_shape(name: str, shape: Shape) -> str:
    return f"{name}:[{','.join(map(str, shape))}]"
