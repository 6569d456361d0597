"""The C++ library of the host tier: the one in build/lib, else one that is built for this run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hstu_trt.tables import native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def native_library(tmp_path_factory):
    """The loaded library; skips where there is no compiler, except in CI."""
    if not native.LIBRARY.is_file():
        if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
            assert os.environ.get("CI") != "true", "no C++ compiler: with CI=true this test must run"
            pytest.skip("no C++ compiler")
        folder = tmp_path_factory.mktemp("lib")
        command = ["make", "-s", "-C", str(ROOT), f"LIB={folder}", "tables-lib"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.environ[native.LIBRARY_VARIABLE] = str(folder / native.LIBRARY.name)
    yield native.load_library()
    os.environ.pop(native.LIBRARY_VARIABLE, None)
