"""HSTU_TRT_TABLES_HOT_ROWS as the plugin reads it, compiled alone: no GPU, no TensorRT."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hstu_trt.plugins.library import ROOT

VARIABLE = "HSTU_TRT_TABLES_HOT_ROWS"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("hot_rows") / "hot_rows"
    sources = [ROOT / "tests/plugins/hot_rows_main.cpp", ROOT / "plugins/csrc/trt/hot_rows.cpp"]
    subprocess.run([compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-o", built, *sources], check=True)
    return built


def wanted(program: Path, table: str, value: str | None) -> tuple[int, str]:
    """Exit code and output for a table of 1,000 rows under the variable, which None leaves unset."""
    environment = {name: text for name, text in os.environ.items() if name != VARIABLE}
    if value is not None:
        environment[VARIABLE] = value
    done = subprocess.run([program, table, "1000"], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    ("value", "rows"),
    [
        (None, 1000),
        ("", 1000),
        ("item=10", 10),
        ("item=0", 0),
        ("item=1000000", 1000),
        (f"item={10**30}", 1000),
        ("user=5", 1000),
        ("items=5,ite=6", 1000),
        ("user=5,item=7", 7),
        ("item=7,user=5,", 7),
    ],
)
def test_rows_of_a_table(program: Path, value: str | None, rows: int) -> None:
    assert wanted(program, "item", value) == (0, str(rows))


@pytest.mark.parametrize(
    ("value", "entry"),
    [
        ("item=", "item="),
        ("item= ", "item= "),
        ("item= 5", "item= 5"),
        ("item=+5", "item=+5"),
        ("item=-0", "item=-0"),
        ("item=-1", "item=-1"),
        ("item=5x", "item=5x"),
        ("item=0x10", "item=0x10"),
        ("item=1e6", "item=1e6"),
        ("item", "item"),
        ("=5", "=5"),
        (",item=5", ""),
        ("item=5,user=", "user="),
        ("user=,item=5", "user="),
    ],
)
def test_what_is_no_number_of_rows_is_refused(program: Path, value: str, entry: str) -> None:
    code, said = wanted(program, "item", value)
    assert (code, said) == (1, f"{VARIABLE}={value}: '{entry}' is not TABLE=ROWS")
