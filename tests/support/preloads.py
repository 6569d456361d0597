"""Small C libraries that tests compile and preload into a server's processes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def compiled(name, folder):
    """The library of ``tests/support/NAME.c``, made in ``folder``; skips where no C compiler is, but not in CI."""
    compiler = shutil.which(os.environ.get("CXX", "cc")) or shutil.which("cc")
    if compiler is None:
        assert os.environ.get("CI") != "true", "no C compiler: with CI=true this test must run"
        pytest.skip("no C compiler")
    source, library = Path(__file__).with_name(f"{name}.c"), folder / f"{name}.so"
    command = [compiler, "-x", "c", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, source, "-ldl"]
    subprocess.run(list(map(str, command)), check=True)
    return library
