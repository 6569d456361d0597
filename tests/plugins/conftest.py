"""The library, built once per run where there is a compiler, and the backend that runs it on a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.plugin_files import LIBRARY_FOLDER, plugin_library
from hstu_trt.plugins.build import BUILD_FOLDER, DEFAULT_ARCHS, BuildPlan, build, default_jobs, read_record
from hstu_trt.plugins.library import LIBRARY, LIBRARY_VARIABLE, ROOT, KernelLibrary, load_library
from hstu_trt.plugins.toolchain import ToolchainError, find_toolchain

if TYPE_CHECKING:
    from attention_cases import GpuBackend


@pytest.fixture(scope="session")
def library() -> KernelLibrary:
    """The one that HSTU_TRT_LIB names, or build/lib's: brought up to date where it was built, or built now."""
    there = (LIBRARY_FOLDER / LIBRARY).is_file()
    if os.environ.get(LIBRARY_VARIABLE) or (there and not BUILD_FOLDER.is_dir()):
        return load_library()
    try:
        build(BuildPlan(find_toolchain(), _archs(), default_jobs()), quiet=True)
    except ToolchainError as error:
        if not there:
            pytest.skip(str(error))
    return load_library()


def _archs() -> tuple[str, ...]:
    """Those of the last build, so that nothing is compiled again for other GPUs."""
    try:
        archs = read_record()[0]["archs"]
    except ArtefactError:
        return DEFAULT_ARCHS
    assert isinstance(archs, list)
    return tuple(archs)


@pytest.fixture(scope="session")
def plugins(library: KernelLibrary) -> Path:
    """The TensorRT plugin library, which is built with the kernels where TensorRT's headers are."""
    try:
        return plugin_library()
    except ArtefactError as error:
        absent(str(error))


@pytest.fixture(scope="session", params=["10.15.1.29", "11.4.0.106"])
def lean(request: pytest.FixtureRequest) -> Path:
    """A folder with one of NVIDIA's lean runtimes and its Python bindings."""
    folder = ROOT / f"build/tensorrt/lean-{request.param}"
    if not folder.is_dir():
        absent(f"{folder} is not there: `make test-plugins` brings it")
    return folder


def absent(reason: str) -> NoReturn:
    """Skips; in CI, where the set-up brings everything, fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def gpu(library: KernelLibrary) -> GpuBackend:
    """Runs calls on the GPU; for tests marked gpu."""
    from attention_cases import GpuBackend

    return GpuBackend()
