"""Lint of a model repository: misconfigurations that Triton accepts, or answers with a message that helps nobody.

Each rule is a function from a repository to messages that say what to do. Rules run before every launch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ConfigError, GateError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.serving import pbtxt
from hstu_trt.serving.engine_steps import PLAN_FILE
from hstu_trt.serving.models.waiting_room import queue_places
from hstu_trt.serving.served import LOOKUP_MODELS, SERVED, models_of
from hstu_trt.serving.signature import MODELS, QUEUE_PARAMETER, TIERS_PARAMETER, Port, Signature, signatures
from hstu_trt.tables.tier_settings import FILE as TIERS_FILE


@dataclass(frozen=True)
class Repository:
    """What the rules look at."""

    path: Path
    configs: dict[str, pbtxt.ModelConfig]
    wanted: dict[str, Signature]
    """The contract's signature of each model."""

    def ensembles(self) -> Iterator[tuple[str, pbtxt.ModelConfig]]:
        """The ensembles among the configs."""
        return ((name, config) for name, config in self.configs.items() if config.platform == "ensemble")


@dataclass(frozen=True)
class Finding:
    """A broken rule."""

    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"


Rule = Callable[[Repository], Iterator[str]]
RULES: dict[str, Rule] = {}


def _rule(identity: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES[identity] = function
        return function

    return register


def lint(path: Path, model: ModelFolder, flavour: str = "cpu", served: Sequence[str] = SERVED) -> list[Finding]:
    """Every finding in the repository at ``path`` that serves ``model`` in a flavour."""
    signed = signatures(model.ranking_config, model.limits, model.precision, flavour)
    wanted = {name: signed[name] for name in models_of(served)}
    repository = Repository(path, pbtxt.read_repository(path), wanted)
    return [Finding(identity, message) for identity, rule in RULES.items() for message in rule(repository)]


def require_clean(path: Path, model: ModelFolder, flavour: str = "cpu", served: Sequence[str] = SERVED) -> None:
    """Raises GateError that lists every finding."""
    if findings := lint(path, model, flavour, served):
        raise GateError("the model repository has faults:\n" + "\n".join(f"  {finding}" for finding in findings))


def _is_tensorrt(config: pbtxt.ModelConfig) -> bool:
    return config.platform == "tensorrt_plan" or config.backend == "tensorrt"


def _ragged(config: pbtxt.ModelConfig) -> list[str]:
    return [port.name for port in config.input if port.allow_ragged_batch]


@_rule("folder-stray")
def stray_folder(repository: Repository) -> Iterator[str]:
    """Triton takes any folder for a model and refuses to start if it is none."""
    for path in sorted(repository.path.iterdir()):
        if path.is_dir() and path.name not in repository.configs:
            yield f"{path} is not a model, and Triton will not start beside it; remove it"


@_rule("folder-version")
def version_folder(repository: Repository) -> Iterator[str]:
    """A model without a version folder does not load, an ensemble neither."""
    for name in repository.configs:
        folder = repository.path / name / "1"
        if not folder.is_dir():
            yield f"{name} has no version folder; make {folder} (with a .gitkeep, if it stays empty)"


@_rule("folder-name")
def folder_name(repository: Repository) -> Iterator[str]:
    """The name in the config is the folder's."""
    for name, config in repository.configs.items():
        if config.name != name:
            yield f"folder {name} holds the config of {config.name!r}; write name: {name!r}"


@_rule("R1-ragged-ensemble")
def ragged_ensemble(repository: Repository) -> Iterator[str]:
    """Triton ignores allow_ragged_batch on an ensemble."""
    for name, tensor in ((name, tensor) for name, config in repository.ensembles() for tensor in _ragged(config)):
        yield f"{name}: allow_ragged_batch of {tensor!r} has no effect on an ensemble; set it on the steps"


@_rule("R2-ragged-dims")
def ragged_dims(repository: Repository) -> Iterator[str]:
    """A ragged input is concatenated flat, so it must be 1-D."""
    for name, config in repository.configs.items():
        for port in config.input:
            if port.allow_ragged_batch and list(port.dims) != [-1]:
                yield f"{name}: ragged input {port.name!r} has dims {list(port.dims)}; flatten it to [ -1 ]"


@_rule("R3-batch-input")
def batch_input(repository: Repository) -> Iterator[str]:
    """The Python backend drops batch_input silently; elsewhere only INT32 and FP32 work."""
    for name, config in repository.configs.items():
        for item in config.batch_input:
            targets = ", ".join(item.target_name)
            if config.backend == "python":
                yield f"{name}: the Python backend ignores batch_input ({targets}); compute it in model.py"
            elif pbtxt.type_name(item.data_type) not in ("TYPE_INT32", "TYPE_FP32"):
                yield f"{name}: batch_input {targets} must be TYPE_INT32 or TYPE_FP32"


@_rule("R4-ragged-output")
def ragged_output(repository: Repository) -> Iterator[str]:
    """TensorRT returns the scores of a ragged batch in one piece; without a scatter nobody cuts it."""
    for name, config in repository.configs.items():
        scattered = {target for item in config.batch_output for target in item.target_name}
        if _is_tensorrt(config) and _ragged(config):
            for port in config.output:
                if port.name not in scattered:
                    yield f"{name}: output {port.name!r} needs a batch_output with BATCH_SCATTER_WITH_INPUT_SHAPE"


@_rule("R5-profile")
def profile(repository: Repository) -> Iterator[str]:
    """Without a list, the TensorRT backend uses optimisation profile 0 only."""
    for name, config in repository.configs.items():
        if _is_tensorrt(config) and any(not group.profile for group in config.instance_group):
            yield f'{name}: instance_group names no optimisation profile; write profile: [ "0", ... ]'


@_rule("R7-queue-policy")
def queue_policy(repository: Repository) -> Iterator[str]:
    """Priorities, queue timeouts and queue bounds make Triton's batcher wait up to 500 ms while an instance is idle."""
    for name, config in repository.configs.items():
        batching = config.dynamic_batching
        if batching.priority_levels or batching.HasField("default_queue_policy") or batching.priority_queue_policy:
            yield (
                f"{name}: priorities and queue policies, max_queue_size too, stall the batcher for 500 ms; "
                f"set deadlines at the client, and the parameter {QUEUE_PARAMETER!r}"
            )


@_rule("R8-queue-delay")
def queue_delay(repository: Repository) -> Iterator[str]:
    """A preferred batch size makes every request wait for it at low load; delays of ensemble steps add up."""
    delayed = []
    for name, config in repository.configs.items():
        if config.dynamic_batching.preferred_batch_size:
            yield f"{name}: preferred_batch_size makes requests wait at low load; leave it out"
        if config.dynamic_batching.max_queue_delay_microseconds:
            delayed.append(name)
    for name, config in repository.ensembles():
        if len(slow := [s.model_name for s in config.ensemble_scheduling.step if s.model_name in delayed]) > 1:
            yield f"{name}: the queue delays of {', '.join(slow)} add up; keep one at most"


@_rule("R9-cuda-graphs")
def cuda_graphs(repository: Repository) -> Iterator[str]:
    """A captured graph has fixed shapes, and returns stale results on jagged ones (triton-inference-server#8550)."""
    for name, config in repository.configs.items():
        if config.optimization.cuda.graphs and any(-1 in port.dims for port in config.input):
            yield f"{name}: CUDA graphs answer jagged requests with stale results; remove optimization.cuda.graphs"


@_rule("R10-implicit-state")
def implicit_state(repository: Repository) -> Iterator[str]:
    """The Python backend feeds zeros for an implicit state and drops the new one."""
    for name, config in repository.configs.items():
        if config.backend == "python" and config.sequence_batching.state:
            yield f"{name}: the Python backend does not keep sequence_batching.state; hold the state in model.py"


@_rule("R11-plan")
def engine_file(repository: Repository) -> Iterator[str]:
    """Triton's TensorRT backend reads model.plan; a Python file beside it is never run."""
    for name, config in repository.configs.items():
        folder = repository.path / name / "1"
        if _is_tensorrt(config) and not (folder / PLAN_FILE).is_file():
            yield f"{name}: {folder / PLAN_FILE} is missing; assemble the deployment again with --engines"
        if _is_tensorrt(config) and (folder / "model.py").exists():
            yield f"{name}: {folder / 'model.py'} has no effect on a TensorRT plan; remove it"


@_rule("R12-contract")
def contract_signature(repository: Repository) -> Iterator[str]:
    """Names, dtypes and dims are the contract's; the batch dim does not stand in dims."""
    for name, signature in repository.wanted.items():
        if name not in repository.configs:
            yield f"{name} is missing; assemble the deployment again"
            continue
        found = pbtxt.signature_of(repository.configs[name])
        if found.max_batch_size != signature.max_batch_size:
            yield f"{name}: max_batch_size must be {signature.max_batch_size}, got {found.max_batch_size}"
        yield from _port_differences(name, "input", signature.inputs, found.inputs)
        yield from _port_differences(name, "output", signature.outputs, found.outputs)


@_rule("R18-not-served")
def not_served(repository: Repository) -> Iterator[str]:
    """Triton loads whatever is there: memory for a model that nobody is to ask, and that no canary watches."""
    for name in (name for name in MODELS if name in repository.configs and name not in repository.wanted):
        yield f"{name} belongs to nothing that is served; remove its folder, or assemble the deployment with it"


def _port_differences(model: str, kind: str, wanted: tuple[Port, ...], found: tuple[Port, ...]) -> Iterator[str]:
    by_name = {port.name: port for port in found}
    for port in wanted:
        other = by_name.pop(port.name, None)
        if other is None:
            yield f"{model}: {kind} {port.name!r} {port.data_type} {list(port.dims)} is missing"
        elif other != port:
            yield f"{model}: {kind} {port.name!r} must be {_text(port)}, got {_text(other)}"
    for name in by_name:
        yield f"{model}: {kind} {name!r} is not in the contract; remove it"


def _text(port: Port) -> str:
    return f"{port.data_type} {list(port.dims)}{' ragged' if port.ragged else ''}"


@_rule("R13-ensemble-wiring")
def ensemble_wiring(repository: Repository) -> Iterator[str]:
    """Steps hand over tensors of equal dtype and dims, and pin the version of their model."""
    for name, config in repository.ensembles():
        known = {port.name: port for port in pbtxt.ports_of(config.input)}
        used: Counter[str] = Counter()
        for step in config.ensemble_scheduling.step:
            if step.model_version == -1:
                yield f"{name}: step {step.model_name} takes the latest version; pin model_version: 1"
            if step.model_name not in repository.configs:
                yield f"{name}: step {step.model_name!r} is not in the repository"
                continue
            model = pbtxt.signature_of(repository.configs[step.model_name])
            used.update(step.input_map.values())
            yield from _wire(name, step, model, known)
        for tensor in (port.name for port in config.input if port.name not in used):
            yield f"{name}: input {tensor!r} goes to no step; map it or remove it"
        for port in pbtxt.ports_of(config.output):
            yield from _check_wire(name, "the ensemble's output", port, known.get(port.name))


def _wire(ensemble: str, step: Any, model: Signature, known: dict[str, Port]) -> Iterator[str]:
    """Checks what goes into a step and notes what comes out of it."""
    for port in model.inputs:
        source = step.input_map.get(port.name)
        if source is None:
            yield f"{ensemble}: input {port.name!r} of step {step.model_name} is not mapped"
        else:
            yield from _check_wire(ensemble, f"step {step.model_name}", port, known.get(source))
    outputs = {port.name: port for port in model.outputs}
    for output, tensor in step.output_map.items():
        if output in outputs:
            known[tensor] = outputs[output]
        else:
            yield f"{ensemble}: step {step.model_name} has no output {output!r}"


def _check_wire(ensemble: str, where: str, port: Port, source: Port | None) -> Iterator[str]:
    if source is None:
        yield f"{ensemble}: nothing makes {port.name!r} for {where}"
    elif (source.data_type, source.dims) != (port.data_type, port.dims):
        yield f"{ensemble}: {where} takes {port.name!r} as {_text(port)}, but it comes as {_text(source)}"


@_rule("R14-response-cache")
def response_cache(repository: Repository) -> Iterator[str]:
    """The cache's key is a 64-bit hash without a check, and a user's history never comes twice."""
    for name, config in repository.configs.items():
        if config.response_cache.enable:
            yield f"{name}: the response cache can answer with another user's scores; remove response_cache"


@_rule("R15-gpus")
def several_gpus(repository: Repository) -> Iterator[str]:
    """Steps of an ensemble may land on different GPUs."""
    for ensemble, config in repository.ensembles():
        for step in (step for step in config.ensemble_scheduling.step if step.model_name in repository.configs):
            gpus = {gpu for group in repository.configs[step.model_name].instance_group for gpu in group.gpus}
            if len(gpus) > 1:
                yield f"{ensemble}: step {step.model_name} spans GPUs {sorted(gpus)}; run one server per GPU"


@_rule("R16-tiers")
def tiers(repository: Repository) -> Iterator[str]:
    """Without the parameter, what looks rows up would map files."""
    for name in (name for name in LOOKUP_MODELS if name in repository.configs):
        given = pbtxt.parameter(repository.configs[name], TIERS_PARAMETER) is not None
        if given != (repository.path.parent / TIERS_FILE).is_file():
            yield f"{name}: parameter {TIERS_PARAMETER!r} and {TIERS_FILE} go together; assemble the deployment again"


@_rule("R17-unbounded-queue")
def unbounded_queue(repository: Repository) -> Iterator[str]:
    """Where requests come in, a queue without a bound grows with every second of overload, and all answers are late."""
    for name in (name for name in LOOKUP_MODELS if name in repository.configs):
        try:
            queue_places(pbtxt.parameter(repository.configs[name], QUEUE_PARAMETER) or "")
        except ConfigError as error:
            yield f"{name}: parameter {QUEUE_PARAMETER!r}: {error}"
