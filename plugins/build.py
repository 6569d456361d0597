"""Building the kernels and the TensorRT plugins: CMake with the toolchain found, then a record of what was built."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.plugin_files import LIBRARY_FOLDER
from hstu_trt.plugins.library import LIBRARY, ROOT
from hstu_trt.plugins.resources import KernelResources, Note, demangle, read_logs
from hstu_trt.plugins.toolchain import Toolchain

DEFAULT_ARCHS = ("90a",)
ALL_ARCHS = ("80", "89", "90a", "100a", "120a")
BUILD_FOLDER = ROOT / "build/cmake"
RECORD = LIBRARY_FOLDER / f"{LIBRARY}.json"
"""Beside the library: its GPUs, its toolkit, TensorRT's headers, and each kernel's resources."""
HEADERS_KEY = "tensorrt_headers"
"""In the record: the version of TensorRT's headers that the plugin libraries were built with; empty: there are none."""
_SYSTEM_HEADERS = ("include/NvInferRuntime.h", "include/*-linux-gnu/NvInferRuntime.h")


class BuildError(HstuTrtError):
    """CMake or a compiler failed; its own output says why."""

    exit_code = 1


@dataclass(frozen=True)
class BuildPlan:
    """The two commands of a build."""

    toolchain: Toolchain
    archs: tuple[str, ...]
    jobs: int

    @property
    def configure(self) -> list[str]:
        tools = self.toolchain
        return [
            str(tools.cmake), "--fresh", "-S", str(ROOT), "-B", str(BUILD_FOLDER), "-G", tools.generator,
            f"-DCMAKE_MAKE_PROGRAM={tools.maker}", f"-DCMAKE_CUDA_COMPILER={tools.nvcc}",
            f"-DHSTU_TRT_CUDA_ARCHS={';'.join(self.archs)}",
        ]  # fmt: skip

    @property
    def compile(self) -> list[str]:
        return [str(self.toolchain.cmake), "--build", str(BUILD_FOLDER), "--parallel", str(self.jobs)]

    def as_dict(self) -> dict[str, object]:
        return {
            "nvcc": str(self.toolchain.nvcc),
            "cuda": self.toolchain.cuda,
            "archs": list(self.archs),
            "environment": self.toolchain.environment,
            "commands": [shlex.join(self.configure), shlex.join(self.compile)],
        }


def parse_archs(text: str) -> tuple[str, ...]:
    """``90a,80`` or ``all`` -> compute capabilities in ascending order. Raises HstuTrtError for one unknown."""
    if text == "all":
        return ALL_ARCHS
    named = {name for name in text.replace(";", ",").split(",") if name}
    if unknown := sorted(named - set(ALL_ARCHS)):
        raise HstuTrtError(f"--archs {text}: {', '.join(unknown)} is none of {', '.join(ALL_ARCHS)}, nor is it 'all'")
    if not named:
        raise HstuTrtError(f"--archs is empty: name some of {', '.join(ALL_ARCHS)}, or 'all'")
    return tuple(name for name in ALL_ARCHS if name in named)


def build(plan: BuildPlan, *, quiet: bool = False) -> Path:
    """Configures where the settings are new, compiles what has changed, and writes the record. Returns the library."""
    if not (ROOT / "CMakeLists.txt").is_file():
        raise ArtefactError(f"{ROOT} holds no CMakeLists.txt: the kernels are built in a checkout, installed editable")
    settings = BUILD_FOLDER / "settings.txt"
    wanted = "\n".join([shlex.join(plan.configure), *_own_headers()])
    if not settings.is_file() or settings.read_text() != wanted:
        _run(plan, plan.configure, quiet=True)
        settings.write_text(wanted)
    _run(plan, plan.compile, quiet=quiet)
    kernels, notes = _short_names(*read_logs(BUILD_FOLDER))
    record = {
        "cuda": plan.toolchain.cuda,
        "archs": list(plan.archs),
        HEADERS_KEY: (BUILD_FOLDER / "tensorrt_headers.txt").read_text(),
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
        "notes": [dataclasses.asdict(note) for note in notes],
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return LIBRARY_FOLDER / LIBRARY


def _own_headers() -> list[str]:
    """What cmake/FindTensorRT.cmake takes before the fetched headers: CMake looks for them again where this changes."""
    roots = [f"{name}={os.environ[name]}" for name in ("TENSORRT_ROOT", "TRT_ROOT") if os.environ.get(name)]
    return roots + [str(path) for pattern in _SYSTEM_HEADERS for path in sorted(Path("/usr").glob(pattern))]


def read_record() -> tuple[dict[str, object], list[KernelResources], list[Note]]:
    """The record of the last build, its kernels and ptxas's notes. Raises ArtefactError if it is missing or damaged."""
    try:
        record = json.loads(RECORD.read_text())
        kernels = [KernelResources(**kernel) for kernel in record["kernels"]]
        return record, kernels, [Note(**note) for note in record["notes"]]
    except FileNotFoundError:
        raise ArtefactError(f"{RECORD} is not there: build the kernels with `make plugins`") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{RECORD} is no record of a build ({error}): run `make plugins` again") from None


def _short_names(kernels: list[KernelResources], notes: list[Note]) -> tuple[list[KernelResources], list[Note]]:
    """Kernels with short names, in the sources' order; notes, which quote symbols, with those names too."""
    symbols = list(dict.fromkeys(kernel.name for kernel in kernels))
    short = dict(zip(symbols, demangle(symbols), strict=True))
    renamed = [dataclasses.replace(kernel, name=short[kernel.name]) for kernel in kernels]
    for symbol, name in short.items():
        notes = [dataclasses.replace(note, text=note.text.replace(symbol, name)) for note in notes]
    return sorted(renamed, key=lambda kernel: (kernel.source, kernel.name, kernel.arch)), notes


def _run(plan: BuildPlan, command: Sequence[str], *, quiet: bool) -> None:
    """Runs a command. Quiet: its output is shown only when it fails."""
    environment = {**os.environ, **plan.toolchain.environment}
    captured = subprocess.PIPE if quiet else None
    stderr = subprocess.STDOUT if quiet else None
    result = subprocess.run(command, env=environment, stdout=captured, stderr=stderr, text=True, check=False)
    if result.returncode:
        if quiet:
            print(result.stdout, file=sys.stderr)
        raise BuildError(f"this failed with exit code {result.returncode}: {shlex.join(command)}")


def default_jobs() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
