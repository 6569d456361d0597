"""Engines of the golden checkpoint for the GPU of this machine, each built once per run."""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_runs import lean_library

from hstu_trt.bench.verify.steps import Gpu, engine_precisions, find_gpu
from hstu_trt.bench.workloads.requests_source import Requests, generate_requests
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
def precision(request: pytest.FixtureRequest) -> str:
    """fp16, where a test is not parametrised by it: ``parametrize("precision", PRECISIONS, indirect=True)``."""
    return getattr(request, "param", "fp16")


@pytest.fixture(scope="session")
def model(exported: Callable[[str], Path], precision: str) -> ModelFolder:
    return read_model_folder(exported(precision), verify=False)


@pytest.fixture(scope="session")
def built_in(
    target: str, exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """``built_in("fp16", "--version-compatible")`` is the engines folder in a precision, built with those options.

    Skips where the GPU has no such precision.
    """
    from hstu_trt.contract.cli import main

    @functools.cache
    def build(precision: str, *options: str) -> Path:
        if precision not in engine_precisions(target):
            pytest.skip(f"no {precision} on {target}: fp8 is there from compute capability 8.9 on")
        out = tmp_path_factory.mktemp("engines") / precision
        source = ["--model", str(exported(precision)), "--gpu", target, "--precision", precision]
        stages = ["--builder", "tensorrt", "--stages", ",".join(ALL_STAGES)]
        assert main(["engines", *source, *stages, *options, "--out", str(out)]) == 0
        return out

    return build


@pytest.fixture(scope="session")
def built(built_in: Callable[..., Path], precision: str) -> Callable[..., Path]:
    """``built_in`` for the precision at hand."""
    return functools.partial(built_in, precision)


@pytest.fixture(scope="session")
def lean_runtime() -> ctypes.CDLL:
    """NVIDIA's lean runtime, loaded: a version-compatible plan is built with it inside. Skips without one."""
    import tensorrt

    name = lean_library(str(tensorrt.__version__), ctypes.CDLL)
    if name is None:
        pytest.skip(f"no libnvinfer_lean of TensorRT {tensorrt.__version__}, which such plans are built with")
    return ctypes.CDLL(name)


@pytest.fixture(scope="session")
def requests(model: ModelFolder) -> Requests:
    """The lengths of the CI workload: empty histories and the edges of tiles among them."""
    return generate_requests(model, profile="ci", count=64, seed=5)
