"""Rules of the lint that hold a repository to the contract and to what is served: names, dtypes, wiring, parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving import pbtxt
from hstu_trt.serving.lint_rules import Repository, rule
from hstu_trt.serving.models.waiting_room import queue_places
from hstu_trt.serving.served import LOOKUP_MODELS
from hstu_trt.serving.signature import MODELS, QUEUE_PARAMETER, TIERS_PARAMETER, Port, Signature
from hstu_trt.tables.tier_settings import FILE as TIERS_FILE


@rule("R12-contract")
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


@rule("R18-not-served")
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


@rule("R13-ensemble-wiring")
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


@rule("R16-tiers")
def tiers(repository: Repository) -> Iterator[str]:
    """Without the parameter, what looks rows up would map files."""
    for name in (name for name in LOOKUP_MODELS if name in repository.configs):
        given = pbtxt.parameter(repository.configs[name], TIERS_PARAMETER) is not None
        if given != (repository.path.parent / TIERS_FILE).is_file():
            yield f"{name}: parameter {TIERS_PARAMETER!r} and {TIERS_FILE} go together; assemble the deployment again"


@rule("R17-unbounded-queue")
def unbounded_queue(repository: Repository) -> Iterator[str]:
    """Where requests come in, a queue without a bound grows with every second of overload, and all answers are late."""
    for name in (name for name in LOOKUP_MODELS if name in repository.configs):
        try:
            queue_places(pbtxt.parameter(repository.configs[name], QUEUE_PARAMETER) or "")
        except ConfigError as error:
            yield f"{name}: parameter {QUEUE_PARAMETER!r}: {error}"
