"""Reading and writing ``config.pbtxt`` through Triton's own protobuf."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.serving.signature import Port, Signature

ModelConfig = Any
"""``inference.ModelConfig`` of Triton's protobuf, which is not typed."""

CONFIG_FILE = "config.pbtxt"


def read_repository(repository: Path) -> dict[str, ModelConfig]:
    """The configs of a model repository, by folder name. Raises ArtefactError."""
    paths = sorted(repository.glob(f"*/{CONFIG_FILE}"))
    if not paths:
        raise ArtefactError(f"{repository} is not a Triton model repository: no folder in it holds a {CONFIG_FILE}")
    return {path.parent.name: read_config(path) for path in paths}


def read_config(path: Path) -> ModelConfig:
    """Parses one config. Raises ArtefactError naming file, line and column."""
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise ArtefactError(f"{path}:{error}; see triton_repo/README.md for the format") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ArtefactError(f"{path} is not readable as text ({error})") from None


def config_text(config: ModelConfig) -> str:
    """The config in protobuf's text format."""
    return str(text_format.MessageToString(config))


def difference(name: str, before: ModelConfig, after: ModelConfig) -> str:
    """A unified diff of two configs; empty if they are equal."""
    old, new = (config_text(config).splitlines(keepends=True) for config in (before, after))
    return "".join(difflib.unified_diff(old, new, f"triton_repo/{name}/{CONFIG_FILE}", f"models/{name}/{CONFIG_FILE}"))


def signature_of(config: ModelConfig) -> Signature:
    """Inputs and outputs as a config states them."""
    return Signature(ports_of(config.input), ports_of(config.output), config.max_batch_size)


def ports_of(ports: Iterable[Any]) -> tuple[Port, ...]:
    """Inputs or outputs of a config."""
    return tuple(
        Port(
            port.name,
            type_name(port.data_type),
            tuple(port.dims),
            bool(getattr(port, "allow_ragged_batch", False)),
        )
        for port in ports
    )


def fit(config: ModelConfig, signature: Signature) -> None:
    """Sets batch size, dtypes and dims of a config in place, and removes tensors that the model does not have."""
    config.max_batch_size = signature.max_batch_size
    _fit_ports(config.name, config.input, signature.inputs)
    _fit_ports(config.name, config.output, signature.outputs)


def _fit_ports(model: str, ports: Any, wanted: tuple[Port, ...]) -> None:
    by_name = {port.name: port for port in wanted}
    missing = by_name.keys() - {port.name for port in ports}
    if missing:
        raise ArtefactError(f"{model}/{CONFIG_FILE} in triton_repo has no tensor {sorted(missing)}: add it there")
    for index in reversed(range(len(ports))):
        if ports[index].name not in by_name:
            del ports[index]
            continue
        port = by_name[ports[index].name]
        ports[index].data_type = model_config_pb2.DataType.Value(port.data_type)
        ports[index].dims[:] = port.dims


def add_ports(config: ModelConfig, signature: Signature) -> None:
    """Adds the inputs and outputs that a config lacks, in place."""
    for ports, wanted in ((config.input, signature.inputs), (config.output, signature.outputs)):
        known = {port.name for port in ports}
        for port in (port for port in wanted if port.name not in known):
            ports.add(name=port.name, data_type=model_config_pb2.DataType.Value(port.data_type), dims=port.dims)


def fit_steps(config: ModelConfig, steps: dict[str, Signature]) -> None:
    """Removes from an ensemble's maps the tensors that a step does not have."""
    for step in config.ensemble_scheduling.step:
        signature = steps[step.model_name]
        for mapping, ports in ((step.input_map, signature.inputs), (step.output_map, signature.outputs)):
            for name in set(mapping) - {port.name for port in ports}:
                del mapping[name]


def parameter(config: ModelConfig, key: str) -> str | None:
    """A string parameter of a config."""
    return str(config.parameters[key].string_value) if key in config.parameters else None


def set_parameter(config: ModelConfig, key: str, value: str) -> None:
    """Sets a string parameter of a config in place."""
    config.parameters[key].string_value = value


def type_name(data_type: int) -> str:
    """The name of a ``DataType``, as in ``TYPE_INT32``."""
    known = model_config_pb2.DataType
    return str(known.Name(data_type)) if data_type in known.values() else f"unknown type {data_type}"
