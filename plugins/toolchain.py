"""Finding what the kernels are built with: nvcc, a C++ compiler, CMake, and ninja or make.

nvcc is the one that CUDACXX, CUDA_HOME or PATH name, the one in /usr/local/cuda, or the one in NVIDIA's wheels, which
the extra ``cuda`` installs into this environment; CMake and ninja come from PATH or from that extra as well.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hstu_trt.contract.errors import HstuTrtError

OLDEST_CUDA = (12, 8)
"""The first with sm_100a and sm_120a. Tried with 13.0."""

SYSTEM_CUDA = Path("/usr/local/cuda")

_INSTALL = "`make plugins` installs it from pinned wheels, and so does pip install -c constraints.txt -e '.[cuda]'"


class ToolchainError(HstuTrtError):
    """Something that the build needs is not on this machine. Names it and what brings it."""


@dataclass(frozen=True)
class Toolchain:
    """Programs that build the kernels."""

    nvcc: Path
    cuda: str
    """The toolkit's release, such as 13.0."""
    cmake: Path
    generator: str
    maker: Path
    """ninja or make."""
    environment: dict[str, str] = field(default_factory=dict)
    """What the build needs beside the environment of this process."""


def find_toolchain() -> Toolchain:
    """Raises ToolchainError with everything that is missing."""
    nvcc, cmake = find_nvcc(), _program("cmake")
    ninja, make = _program("ninja"), _program("make")
    compiler = os.environ.get("CXX") or "c++"
    missing = []
    if nvcc is None:
        missing.append(
            "nvcc, the CUDA compiler: neither CUDACXX, CUDA_HOME nor PATH name one, and there is none in "
            f"{SYSTEM_CUDA} or in NVIDIA's wheels; {_INSTALL}"
        )
    if shutil.which(compiler) is None:
        missing.append(f"a C++ compiler: there is no {compiler!r}; install g++ from the system's packages")
    if cmake is None:
        missing.append(f"CMake: {_INSTALL}")
    if ninja is None and make is None:
        missing.append(f"ninja: {_INSTALL}")
    if missing:
        raise ToolchainError(
            "the CUDA kernels cannot be built here (everything that runs on a CPU works without them). Missing:\n  - "
            + "\n  - ".join(missing)
        )
    assert nvcc is not None and cmake is not None
    maker = ninja or make
    assert maker is not None
    generator = "Ninja" if ninja else "Unix Makefiles"
    return Toolchain(nvcc, cuda_release(nvcc), cmake, generator, maker, _environment(nvcc))


def find_nvcc() -> Path | None:
    """The CUDA compiler, or None. A variable that names a missing file is an error, not a reason to look elsewhere."""
    for variable, below in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc")):
        if value := os.environ.get(variable):
            named = shutil.which(value) if variable == "CUDACXX" else None
            nvcc = Path(named or Path(value) / below)
            if not nvcc.is_file():
                raise ToolchainError(f"{variable}={value}: there is no nvcc at {nvcc}")
            return nvcc
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    roots = [SYSTEM_CUDA, *wheel_roots()]
    return next((root / "bin/nvcc" for root in roots if (root / "bin/nvcc").is_file()), None)


def wheel_roots() -> list[Path]:
    """Folders in which NVIDIA's wheels lay out a toolkit: ``nvidia/cu13`` in site-packages."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations or []) if spec else []
    return sorted((root for place in places for root in Path(place).glob("cu[0-9]*")), reverse=True)


def cuda_release(nvcc: Path) -> str:
    """What ``nvcc --version`` says, such as 13.0. Raises ToolchainError for one that is too old or does not run."""
    try:
        shown = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolchainError(f"{nvcc} does not run: {error}") from None
    release = re.search(r"release (\d+)\.(\d+)", shown)
    if release is None:
        raise ToolchainError(f"{nvcc} --version names no release: {shown.strip()[:200]}")
    if (int(release[1]), int(release[2])) < OLDEST_CUDA:
        oldest = ".".join(map(str, OLDEST_CUDA))
        raise ToolchainError(f"{nvcc} is CUDA {release[1]}.{release[2]}; {oldest} or later is needed")
    return f"{release[1]}.{release[2]}"


def _program(name: str) -> Path | None:
    """A program on PATH or beside this Python, where pip puts those of its wheels."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return Path(found) if found else None


def _environment(nvcc: Path) -> dict[str, str]:
    """The wheels keep their libraries in lib/, and nvcc looks for them in lib64/."""
    root = nvcc.parents[1]
    if root not in wheel_roots():
        return {}
    return {"LIBRARY_PATH": os.pathsep.join(filter(None, (str(root / "lib"), os.environ.get("LIBRARY_PATH"))))}
