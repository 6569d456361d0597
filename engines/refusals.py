"""What the TensorRT builders refuse before they begin, each with what to do instead."""

from __future__ import annotations

from hstu_trt.contract.errors import ConfigError
from hstu_trt.engines.builders import BuildRequest
from hstu_trt.engines.cuda_driver import Device
from hstu_trt.engines.modules import Flavour, TensorRt
from hstu_trt.engines.targets import AMPERE, capability_text, find_target


def check_options(flavour: Flavour, request: BuildRequest) -> None:
    """Refuses options that a builder does not have. Raises ConfigError."""
    options = request.options
    if flavour.on_device:
        if options.also:
            raise ConfigError("--also is for builder tensorrt_rtx; with tensorrt, take --hardware-compat ampere_plus")
        return
    # Measured with 1.7.1: the first three fail without a GPU or a lean runtime, the others change nothing.
    given = {
        "--refit": options.refit,
        "--strip-plan": options.strip_plan,
        "--version-compatible": options.version_compatible,
        "--hardware-compat": options.hardware_compat != "none",
        "--opt-level": options.optimization_level is not None,
    }
    for name, is_given in given.items():
        if is_given:
            hint = " (several GPUs in one engine: --also NAME,...)" if name == "--hardware-compat" else ""
            raise ConfigError(f"{name} is for builder tensorrt; {flavour.title} builds ahead of time without it{hint}")
    for name in options.also:
        target = find_target(name)
        if flavour.name not in target.builders:
            raise ConfigError(f"--also {name}: {flavour.title} does not build for it; see hstu-trt engines --list")
        check_precision(target.name, request.model.precision)


def check_precision(target_name: str, precision: str) -> None:
    """Refuses a precision that a GPU does not compute in. Raises ConfigError."""
    target = find_target(target_name)
    if precision in target.precisions:
        return
    why = ""
    if precision == "fp8" and target.compute_capability:
        why = f": compute capability {capability_text(target.compute_capability)} has no fp8, 8.9 and later have"
    raise ConfigError(f"{target_name} has no precision {precision!r}{why}; choose from {', '.join(target.precisions)}")


def check_capabilities(trt: TensorRt, capabilities: tuple[int, ...]) -> None:
    """Refuses GPUs that this TensorRT-RTX does not compile for. Raises ConfigError."""
    for capability in capabilities:
        if not hasattr(trt.module.ComputeCapability, f"SM{capability}"):
            raise ConfigError(
                f"{trt.flavour.title} {trt.version} does not compile for compute capability "
                f"{capability_text(capability)}; choose another target (hstu-trt engines --list) or version"
            )


def check_device(request: BuildRequest, device: Device) -> None:
    """Refuses to build on another GPU than the engine is for. Raises ConfigError."""
    target, level = request.target, request.options.hardware_compat
    here = f"the GPU here is {device.name} (compute capability {capability_text(device.compute_capability)})"
    if level == "ampere_plus":
        if min(target.compute_capability, device.compute_capability) < AMPERE:
            raise ConfigError(f"--hardware-compat ampere_plus needs compute capability 8.0 or later; {here}")
        return
    if device.compute_capability != target.compute_capability:
        wanted = f"{target.name} has {capability_text(target.compute_capability)}"
        raise ConfigError(
            f"{here}, {wanted}: TensorRT builds on the GPU that will run the engine. Run this on a machine with "
            f"{target.title}, choose the --gpu that is here, or take --hardware-compat ampere_plus"
        )
    if level == "none" and not target.is_device(device.name):
        raise ConfigError(
            f"{here}, not {target.title}: an engine is tuned for one model of GPU. Choose the --gpu that is here, or "
            "take --hardware-compat same_cc"
        )
