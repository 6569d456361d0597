"""Rules of the lint that hold for any model repository, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.serving import pbtxt
from hstu_trt.serving.engine_steps import PLAN_FILE
from hstu_trt.serving.signature import QUEUE_PARAMETER, Signature


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


def rule(identity: str) -> Callable[[Rule], Rule]:
    """Adds a rule under its name."""

    def register(function: Rule) -> Rule:
        RULES[identity] = function
        return function

    return register


def _is_tensorrt(config: pbtxt.ModelConfig) -> bool:
    return config.platform == "tensorrt_plan" or config.backend == "tensorrt"


def _ragged(config: pbtxt.ModelConfig) -> list[str]:
    return [port.name for port in config.input if port.allow_ragged_batch]


@rule("folder-stray")
def stray_folder(repository: Repository) -> Iterator[str]:
    """Triton takes any folder for a model and refuses to start if it is none."""
    for path in sorted(repository.path.iterdir()):
        if path.is_dir() and path.name not in repository.configs:
            yield f"{path} is not a model, and Triton will not start beside it; remove it"


@rule("folder-version")
def version_folder(repository: Repository) -> Iterator[str]:
    """A model without a version folder does not load, an ensemble neither."""
    for name in repository.configs:
        folder = repository.path / name / "1"
        if not folder.is_dir():
            yield f"{name} has no version folder; make {folder} (with a .gitkeep, if it stays empty)"


@rule("folder-name")
def folder_name(repository: Repository) -> Iterator[str]:
    """The name in the config is the folder's."""
    for name, config in repository.configs.items():
        if config.name != name:
            yield f"folder {name} holds the config of {config.name!r}; write name: {name!r}"


@rule("R1-ragged-ensemble")
def ragged_ensemble(repository: Repository) -> Iterator[str]:
    """Triton ignores allow_ragged_batch on an ensemble."""
    for name, tensor in ((name, tensor) for name, config in repository.ensembles() for tensor in _ragged(config)):
        yield f"{name}: allow_ragged_batch of {tensor!r} has no effect on an ensemble; set it on the steps"


@rule("R2-ragged-dims")
def ragged_dims(repository: Repository) -> Iterator[str]:
    """A ragged input is concatenated flat, so it must be 1-D."""
    for name, config in repository.configs.items():
        for port in config.input:
            if port.allow_ragged_batch and list(port.dims) != [-1]:
                yield f"{name}: ragged input {port.name!r} has dims {list(port.dims)}; flatten it to [ -1 ]"


@rule("R3-batch-input")
def batch_input(repository: Repository) -> Iterator[str]:
    """The Python backend drops batch_input silently; elsewhere only INT32 and FP32 work."""
    for name, config in repository.configs.items():
        for item in config.batch_input:
            targets = ", ".join(item.target_name)
            if config.backend == "python":
                yield f"{name}: the Python backend ignores batch_input ({targets}); compute it in model.py"
            elif pbtxt.type_name(item.data_type) not in ("TYPE_INT32", "TYPE_FP32"):
                yield f"{name}: batch_input {targets} must be TYPE_INT32 or TYPE_FP32"


@rule("R4-ragged-output")
def ragged_output(repository: Repository) -> Iterator[str]:
    """TensorRT returns the scores of a ragged batch in one piece; without a scatter nobody cuts it."""
    for name, config in repository.configs.items():
        scattered = {target for item in config.batch_output for target in item.target_name}
        if _is_tensorrt(config) and _ragged(config):
            for port in config.output:
                if port.name not in scattered:
                    yield f"{name}: output {port.name!r} needs a batch_output with BATCH_SCATTER_WITH_INPUT_SHAPE"


@rule("R5-profile")
def profile(repository: Repository) -> Iterator[str]:
    """Without a list, the TensorRT backend uses optimisation profile 0 only."""
    for name, config in repository.configs.items():
        if _is_tensorrt(config) and any(not group.profile for group in config.instance_group):
            yield f'{name}: instance_group names no optimisation profile; write profile: [ "0", ... ]'


@rule("R7-queue-policy")
def queue_policy(repository: Repository) -> Iterator[str]:
    """Priorities, queue timeouts and queue bounds make Triton's batcher wait up to 500 ms while an instance is idle."""
    for name, config in repository.configs.items():
        batching = config.dynamic_batching
        if batching.priority_levels or batching.HasField("default_queue_policy") or batching.priority_queue_policy:
            yield (
                f"{name}: priorities and queue policies, max_queue_size too, stall the batcher for 500 ms; "
                f"set deadlines at the client, and the parameter {QUEUE_PARAMETER!r}"
            )


@rule("R8-queue-delay")
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


@rule("R9-cuda-graphs")
def cuda_graphs(repository: Repository) -> Iterator[str]:
    """A captured graph has fixed shapes, and returns stale results on jagged ones (triton-inference-server#8550)."""
    for name, config in repository.configs.items():
        if config.optimization.cuda.graphs and any(-1 in port.dims for port in config.input):
            yield f"{name}: CUDA graphs answer jagged requests with stale results; remove optimization.cuda.graphs"


@rule("R10-implicit-state")
def implicit_state(repository: Repository) -> Iterator[str]:
    """The Python backend feeds zeros for an implicit state and drops the new one."""
    for name, config in repository.configs.items():
        if config.backend == "python" and config.sequence_batching.state:
            yield f"{name}: the Python backend does not keep sequence_batching.state; hold the state in model.py"


@rule("R11-plan")
def engine_file(repository: Repository) -> Iterator[str]:
    """Triton's TensorRT backend reads model.plan; a Python file beside it is never run."""
    for name, config in repository.configs.items():
        folder = repository.path / name / "1"
        if _is_tensorrt(config) and not (folder / PLAN_FILE).is_file():
            yield f"{name}: {folder / PLAN_FILE} is missing; assemble the deployment again with --engines"
        if _is_tensorrt(config) and (folder / "model.py").exists():
            yield f"{name}: {folder / 'model.py'} has no effect on a TensorRT plan; remove it"


@rule("R14-response-cache")
def response_cache(repository: Repository) -> Iterator[str]:
    """The cache's key is a 64-bit hash without a check, and a user's history never comes twice."""
    for name, config in repository.configs.items():
        if config.response_cache.enable:
            yield f"{name}: the response cache can answer with another user's scores; remove response_cache"


@rule("R15-gpus")
def several_gpus(repository: Repository) -> Iterator[str]:
    """Steps of an ensemble may land on different GPUs."""
    for ensemble, config in repository.ensembles():
        for step in (step for step in config.ensemble_scheduling.step if step.model_name in repository.configs):
            gpus = {gpu for group in repository.configs[step.model_name].instance_group for gpu in group.gpus}
            if len(gpus) > 1:
                yield f"{ensemble}: step {step.model_name} spans GPUs {sorted(gpus)}; run one server per GPU"
