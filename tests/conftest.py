"""Run-wide fixtures, and the probes behind the markers: a test that cannot run here says why."""

import functools
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hstu_trt.tables.native import NativeLibrary

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-target", metavar="NAME", help="what engines are built for (default: the GPU here)")


@functools.cache
def missing_triton() -> str | None:
    """Why no tritonserver can be started here, or None."""
    if shutil.which("tritonserver") or Path("/opt/tritonserver/bin/tritonserver").is_file():
        return None
    if importlib.util.find_spec("pytriton"):
        return None
    return "no tritonserver: neither an installation nor the nvidia-pytriton wheel"


@functools.cache
def missing_gpu() -> str | None:
    """Why no kernel can be run here, or None."""
    import torch

    return None if torch.cuda.is_available() else "no CUDA GPU"


@functools.cache
def missing_tensorrt() -> str | None:
    """Why no TensorRT engine can be built here, or None."""
    return None if importlib.util.find_spec("tensorrt") else "the full TensorRT library is not installed"


@functools.cache
def missing_redis() -> str | None:
    """Why the remote tier cannot be tested here, or None."""
    from hstu_trt.bench.tables.local_cluster import find_server
    from hstu_trt.tables.remote_library import LIBRARY

    if not LIBRARY.is_file():
        return "the client of the remote tier is not built: make remote-lib"
    return None if find_server() else "no redis-server: make redis, or put one on PATH"


@functools.cache
def missing_nginx() -> str | None:
    """Why no gateway can be started here, or None."""
    from hstu_trt.contract.errors import ArtefactError
    from hstu_trt.serving.fleet.gateway import find_nginx

    try:
        find_nginx()
    except ArtefactError as error:
        return str(error)
    return None


PROBES = {
    "triton": missing_triton,
    "gpu": missing_gpu,
    "tensorrt": missing_tensorrt,
    "redis": missing_redis,
    "nginx": missing_nginx,
}

# What `make install` and `make test` bring: in CI its absence is a failure of the set-up, not a reason to skip.
NEEDED_IN_CI = {"triton", "redis", "nginx"}


# Tests of real processes that listen, are killed, and wait for each other.
STARTS_PROCESSES = {"triton", "redis", "nginx", "faults"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In CI, one of those that fails is run once more, and shown as RERUN with its traceback: to be looked into.

    What fails once in hundreds of runs on a shared machine says nothing of the change that is tested; what a change
    breaks fails twice. `.ci/run` bounds how many may be run again. By hand nothing is: there, every failure counts.
    """
    if os.environ.get("CI") == "true":
        for item in items:
            if any(item.get_closest_marker(name) for name in STARTS_PROCESSES):
                item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, probe in PROBES.items():
        reason = probe() if item.get_closest_marker(marker) else None
        if reason is None:
            continue
        if marker in NEEDED_IN_CI and os.environ.get("CI") == "true":
            pytest.fail(f"{reason}; `make test` brings it, and with CI=true this test must run", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of reference cases."""
    return GOLDEN


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``exported("fp32")`` is the model folder of the golden checkpoint in a precision, exported once per run."""
    from hstu_trt.contract.cli import main

    @functools.cache
    def export(precision: str) -> Path:
        folder = tmp_path_factory.mktemp("onnx") / "ckptA" / precision
        config, weights = GOLDEN / "caseA/config.json", GOLDEN / "ckptA"
        arguments = ["--config", config, "--weights", weights, "--precision", precision, "--out", folder]
        assert main(["export", *map(str, arguments)]) == 0
        return folder

    return export


@pytest.fixture(scope="session")
def native_library(tmp_path_factory: pytest.TempPathFactory) -> Iterator["NativeLibrary"]:
    """The host tier's C++ library, built for this run where build/lib has none; skips without a compiler."""
    from hstu_trt.tables import native

    if not native.LIBRARY.is_file():
        if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
            assert os.environ.get("CI") != "true", "no C++ compiler: with CI=true this test must run"
            pytest.skip("no C++ compiler")
        folder = tmp_path_factory.mktemp("lib")
        command = ["make", "-s", "-C", str(GOLDEN.parents[1]), f"LIB={folder}", "tables-lib"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.environ[native.LIBRARY_VARIABLE] = str(folder / native.LIBRARY.name)
    yield native.load_library()
    os.environ.pop(native.LIBRARY_VARIABLE, None)
