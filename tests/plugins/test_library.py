"""The C face without a GPU: the mirrors of its structs, what a launch that failed says, and other libraries."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.plugins.library import (
    KERNELS,
    LIBRARY_VARIABLE,
    ROOT,
    TABLE_TYPES,
    AttentionParams,
    KernelError,
    KernelLibrary,
)

HEADERS = ROOT / "plugins/csrc/kernels"


def test_the_mirror_is_the_structs(library: KernelLibrary) -> None:
    assert library.layout_differences() == []


def test_a_shifted_mirror_is_noticed(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = (("q", ctypes.c_int32), *AttentionParams._fields_[1:])

    monkeypatch.setattr("hstu_trt.plugins.library.AttentionParams", Shifted)
    differences = library.layout_differences()
    assert any("field q" in text for text in differences)
    assert any("parameters of" in text for text in differences)
    with pytest.raises(ArtefactError, match="is of other sources"):
        KernelLibrary(library.path)


def enum_values(header: str, name: str) -> dict[str, int]:
    body = re.search(rf"enum class {name} [^{{]*{{(.*?)}}", (HEADERS / header).read_text(), re.DOTALL)
    assert body
    return {key.lower(): int(value) for key, value in re.findall(r"\bk(\w+) = (\d)", body[1])}


def test_names_are_the_enums() -> None:
    kernels = enum_values("attention/attention.h", "AttentionKernel")
    types = enum_values("common/data_type.h", "DataType")
    kernels["fp32"] = kernels.pop("float32")
    types["float8_e4m3fn"] = types.pop("float8e4m3")
    assert kernels == KERNELS
    assert types == TABLE_TYPES


def test_value_blocks_are_those_of_the_header(library: KernelLibrary) -> None:
    from hstu_trt.plugins.parameters import value_blocks

    shapes = [(0, 0), (0, 3), (127, 1), (128, 1), (1000, 5)]
    assert [library.value_blocks(*shape) for shape in shapes] == [value_blocks(*shape) for shape in shapes]


def test_a_failed_launch_names_cudas_error(library: KernelLibrary) -> None:
    with pytest.raises(KernelError, match=r"pack_values: cudaError\w+: .*built for"):
        library.raise_on(1, "pack_values")


def run_with_library(path: Path) -> str:
    code = "from hstu_trt.plugins.library import load_library; load_library()"
    environment = {**os.environ, LIBRARY_VARIABLE: str(path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.returncode
    return result.stderr


def test_a_missing_library_names_what_makes_it(tmp_path: Path) -> None:
    assert "is not there: build the kernels with `make plugins`" in run_with_library(tmp_path / "none.so")


def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign.so").write_text("no library")
    assert "run `make plugins`" in run_with_library(tmp_path / "foreign.so")
