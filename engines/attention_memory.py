"""What attention costs in memory: dense over a batch in the function body, in tiles in the plugin.

The body makes tensors of [heads, tokens, tokens]: scores in fp32 and weights in the model's type. TensorRT tensors hold
at most 2^31 - 1 elements, and the figure that a build logs for larger ones is of no use (seen: it falls with the
length). So a profile that needs more is left out, and a runner takes the users one by one.
"""

from __future__ import annotations

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.text import bytes_text
from hstu_trt.engines.builders import BuildRequest
from hstu_trt.engines.profiles import Profile
from hstu_trt.engines.targets import find_target

MAX_ELEMENTS = 2**31 - 1
_ITEM_BYTES = {"fp32": 4, "fp16": 2, "fp8": 2}
_TYPE_NAMES = {"fp32": "float32", "fp16": "float16", "fp8": "float8_e4m3fn"}


def fitting_profiles(request: BuildRequest, stage: str, profiles: list[Profile]) -> tuple[list[Profile], list[str]]:
    """The profiles that dense attention can serve on the targets, and sentences on the others.

    Raises ConfigError if none is left, or one was asked for by name.
    """
    kept, notes = [], []
    for profile in profiles:
        problem = _problem(request, profile)
        if problem is None:
            kept.append(profile)
            continue
        notes.append(f"{stage}: profile {profile.name} is left out: {problem}")
        if request.options.profiles:
            raise ConfigError(f"{notes[-1]}; take smaller bounds: --profile {profile.name}:uih_tokens=0/512/4096")
    if not kept:
        raise ConfigError(
            f"{'; '.join(notes)}; export with smaller --max-history and --max-candidates, give own bounds with "
            "--profile, or build with plugins (--builder tensorrt)"
        )
    return kept, notes


def _problem(request: BuildRequest, profile: Profile) -> str | None:
    count = tokens(request.model, profile)
    elements = request.model.config.heads * count * count
    if elements > MAX_ELEMENTS:
        return f"scores of {count} x {count} tokens in {request.model.config.heads} heads exceed 2^31 - 1 elements"
    targets = (request.target, *(find_target(name) for name in request.options.also))
    memory = min(target.memory_gib for target in targets) << 30
    needed = dense_bytes(request.model, profile)
    return (
        f"attention without the plugin needs {bytes_text(needed)}, the GPU has {bytes_text(memory)}"
        if needed > memory
        else None
    )


def tokens(model: ModelFolder, profile: Profile) -> int:
    """Most tokens of a batch: contextual slots, history and candidates of all users."""
    slots = len(model.config.contextual_slots) if isinstance(model.config, HstuConfig) else 0
    most = {name: bounds[2] for name, bounds in profile.dims.items()}
    return slots * most["users"] + most["uih_tokens"] + most.get("candidates", 0)


def dense_bytes(model: ModelFolder, profile: Profile) -> int:
    """Bytes of one layer's scores (fp32) and weights (the model's type) at the profile's largest shapes."""
    return model.config.heads * tokens(model, profile) ** 2 * (4 + _ITEM_BYTES[model.precision])


def plugin_bytes(model: ModelFolder, profile: Profile) -> int | None:
    """Bytes that the plugin needs for one layer: q, k, v, output, and its workspace; None without the library."""
    from hstu_trt.plugins.library import DATA_TYPES, AttentionParams, load_library

    config, count = model.config, tokens(model, profile)
    size = 1 if model.precision == "fp8" else _ITEM_BYTES[model.precision]
    params = AttentionParams(
        users=profile.dims["users"][2],
        heads=config.heads,
        qk_dim=config.qk_dim,
        v_dim=config.v_dim,
        query_rows=count,
        key_rows=count,
        norm_count=1,
        type=DATA_TYPES[_TYPE_NAMES[model.precision]],
        output_type=DATA_TYPES["float32" if model.precision == "fp32" else "float16"],
        alpha=1.0,
        causal=1,
        candidate_group_size=1,
    )
    try:
        workspace = load_library().workspace_size(params, "auto")
    except ArtefactError:
        return None
    per_token = config.heads * ((2 * config.qk_dim + config.v_dim) * size + config.v_dim * _ITEM_BYTES[model.precision])
    return workspace + count * per_token
