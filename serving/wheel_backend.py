"""The Python backend of the nvidia-pytriton wheel: brought together for this Python, checked before a launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.serving.guard import BACKEND, UNGUARDED

_UTILS = "triton_python_backend_utils.py"
_STUB = "triton_python_backend_stub"


def prepare_backends(wheel: Path, backends: Path, guard: Path | None) -> Path:
    """Copies the Python backend and the stub of this Python's version beside each other, as tritonserver wants them.

    The guard takes the backend's name and loads it under another. Raises ArtefactError.
    """
    _check_numpy(metadata.version("numpy"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / version / _STUB
    if not stub.is_file():
        known = sorted(path.name for path in (wheel / "python_backend_stubs").iterdir())
        raise ArtefactError(f"this tritonserver has no stub for Python {version}; it serves {', '.join(known)}")
    target = backends / "python"
    target.mkdir(parents=True, exist_ok=True)
    python = wheel / "backends" / "python"
    files = {_STUB: stub, _UTILS: python / _UTILS, (UNGUARDED if guard else BACKEND): python / BACKEND}
    for name, source in (files | ({BACKEND: guard} if guard else {})).items():
        _copy_if_changed(source, target / name)
    (target / _STUB).chmod(0o755)
    return backends


def _check_numpy(version: str) -> None:
    """The wheel's stub reads an array's size where numpy 1 keeps it: under numpy 2 it sends answers without a byte."""
    if int(version.partition(".")[0]) > 1:
        raise ArtefactError(
            f"the Python backend of the nvidia-pytriton wheel works with numpy 1, and here is numpy {version}: "
            "pip install 'numpy<2', or run inside NVIDIA's Triton container"
        )


def _copy_if_changed(source: Path, target: Path) -> None:
    old, new = (path.stat() if path.exists() else None for path in (target, source))
    if old and new and (old.st_size, int(old.st_mtime)) == (new.st_size, int(new.st_mtime)):
        return
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copy2(source, part)
    part.replace(target)


def wheel_environment(wheel: Path) -> dict[str, str]:
    """Libraries of the wheel and of this Python; and this Python first on PATH, where the stub finds ``sys.path``.

    The stub ignores PYTHONPATH and PYTHONHOME: it asks the first ``python3`` on PATH.
    """
    libraries = [str(wheel.parents[1] / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    inherited = [os.environ["LD_LIBRARY_PATH"]] if os.environ.get("LD_LIBRARY_PATH") else []
    scripts = str(Path(sys.executable).parent)
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(libraries + inherited),
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]),
    }


def check_libraries(backends: Path, environment: Mapping[str, str]) -> None:
    """A stub that lacks libpython dies without a word in the log, so look first. Raises ArtefactError."""
    answer = subprocess.run(
        ["ldd", str(backends / "python" / _STUB)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    missing = [line.split()[0] for line in answer.stdout.splitlines() if line.endswith("not found")]
    if missing:
        raise ArtefactError(
            f"the Python at {sys.executable} comes without {', '.join(missing)}, which Triton's Python backend needs; "
            "use a Python that was built with --enable-shared, or install its libpython package"
        )
