"""Engines of the golden checkpoint for the GPU of this machine, each built once per run."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from hstu_trt.bench.requests_source import Requests, generate_requests
from hstu_trt.bench.verify_steps import Gpu, find_gpu
from hstu_trt.contract.model_folder import TAPS, ModelFolder, read_model_folder
from hstu_trt.contract.tensors import FUSED, STAGES

ALL_STAGES = (*STAGES, FUSED, TAPS)


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    found = find_gpu()
    assert found is not None, "TensorRT is installed, but nvidia-smi names no GPU"
    return found


@pytest.fixture(scope="session")
def target(gpu: Gpu, pytestconfig: pytest.Config) -> str:
    """What engines are built for: ``--gpu-target``, else the GPU here."""
    return pytestconfig.getoption("--gpu-target") or gpu.target


@pytest.fixture(scope="session")
def model(exported: Callable[[str], Path]) -> ModelFolder:
    return read_model_folder(exported("fp16"), verify=False)


@pytest.fixture(scope="session")
def built(
    target: str, exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``built("--version-compatible")`` is the engines folder in fp16, built with those options."""
    from hstu_trt.contract.cli import main

    @functools.cache
    def build(*options: str) -> Path:
        out = tmp_path_factory.mktemp("engines") / "fp16"
        source = ["--model", str(exported("fp16")), "--gpu", target, "--precision", "fp16", "--builder", "tensorrt"]
        assert main(["engines", *source, "--stages", ",".join(ALL_STAGES), *options, "--out", str(out)]) == 0
        return out

    return build


@pytest.fixture(scope="session")
def requests(model: ModelFolder) -> Requests:
    """The lengths of the CI workload: empty histories and the edges of tiles among them."""
    return generate_requests(model, profile="ci", count=64, seed=5)
