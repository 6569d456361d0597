"""The baseline's deployment: a Triton model repository with Python models that run PyTorch eager."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.contract.tensors import ENSEMBLE
from hstu_trt.serving import pbtxt
from hstu_trt.serving.assemble import Options, fitted_configs
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.server import Listen, find_tritonserver, plan_repository
from hstu_trt.serving.server_process import ServerProcess

EAGER = {"pytorch_eager": None, "pytorch_eager_per_core": 1}
"""Served model -> threads of PyTorch. As it comes: one instance with PyTorch's threads; and tuned: an instance per core
with one thread each, so that requests run side by side."""
_MODEL = '''"""PyTorch eager."""

from hstu_trt.bench.serving.eager_model import EagerModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_READY_S = 60.0


def write_eager_repository(deployment: Deployment, folder: Path) -> Path:
    """Writes the repository for the deployment's model and norm into ``folder``, and returns its path."""
    # As ``ranking`` takes requests, whether this deployment serves it or not.
    ensemble = fitted_configs(deployment.model, Options())[ENSEMBLE]
    for name, threads in EAGER.items():
        _write_model(deployment, ensemble, folder / name, threads)
    return folder


def _write_model(deployment: Deployment, ensemble: pbtxt.ModelConfig, folder: Path, threads: int | None) -> None:
    config = type(ensemble)(name=folder.name, backend="python", max_batch_size=0)
    config.input.extend(ensemble.input)
    config.output.extend(port for port in ensemble.output if port.name == "preds")
    kind = config.DESCRIPTOR.fields_by_name["instance_group"].message_type.enum_types_by_name["Kind"]
    config.instance_group.add(
        kind=kind.values_by_name["KIND_CPU"].number, count=len(os.sched_getaffinity(0)) if threads else 1
    )
    pbtxt.set_parameter(config, "model_folder", str(deployment.model.path.resolve()))
    pbtxt.set_parameter(config, "attention_norm", str(parse_fixed_norm(deployment.attention_norm)))
    if threads is not None:
        pbtxt.set_parameter(config, "threads", str(threads))
    write_text_atomically(folder / pbtxt.CONFIG_FILE, pbtxt.config_text(config))
    write_text_atomically(folder / "1" / "model.py", _MODEL)


@contextlib.contextmanager
def eager_server(deployment: Deployment, folder: Path) -> Iterator[str]:
    """Serves the baseline; the url of its gRPC."""
    import tritonclient.grpc as grpc_client

    repository = write_eager_repository(deployment, folder / "models")
    plan = plan_repository(find_tritonserver(), repository, folder / "run", Listen(grpc_port=0), limits="")
    process = ServerProcess(plan)
    try:
        with grpc_client.InferenceServerClient(process.plan.url) as client:
            end = time.monotonic() + _READY_S
            while not _ready(client):
                if process.exit_code is not None or time.monotonic() > end:
                    raise HstuTrtError(f"the baseline's server did not start; see {process.plan.log}")
                time.sleep(0.1)
        yield process.plan.url
    finally:
        process.drain()


def _ready(client: Any) -> bool:
    from tritonclient.utils import InferenceServerException

    try:
        return all(client.is_model_ready(name, client_timeout=5) for name in EAGER)
    except InferenceServerException:
        return False
