"""Tables in use while their version changes, as the plugin exchanges them: compiled alone, with no GPU."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from hstu_trt.plugins.library import ROOT
from hstu_trt.plugins.toolchain import ToolchainError, find_toolchain


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled by nvcc, which knows where CUDA's headers are; linked to no CUDA."""
    try:
        tools = find_toolchain()
    except ToolchainError as error:
        pytest.skip(str(error))
    built = tmp_path_factory.mktemp("live_tables") / "live_tables"
    sources = [ROOT / "tests/plugins/live_tables_main.cpp", ROOT / "plugins/csrc/trt/live_tables.cpp"]
    command = [str(tools.nvcc), "-std=c++17", "-cudart", "none", "-Xcompiler", "-Wall,-Wextra,-pthread"]
    environment = {**os.environ, **tools.environment}
    subprocess.run([*command, "-o", built, *sources], check=True, env=environment)
    return built


@pytest.mark.parametrize(
    ("case", "said"),
    [
        # Of each table version:width, then the width that lookups in the new one go by.
        ("still", "1:8 1:8 as 8"),
        ("changed before", "2:8 2:16 as 16"),
        ("changes after the first reading", "1:8 1:8 as 8"),
        ("changes while all are loaded anew", "table 'b' in folder: the version changes just now; try again"),
    ],
)
def test_tables_in_use_are_of_one_version(program: Path, case: str, said: str) -> None:
    shown = subprocess.run([program, case], capture_output=True, text=True, check=True, timeout=60).stdout
    assert shown.splitlines() == ["1:8 as 8", said]
