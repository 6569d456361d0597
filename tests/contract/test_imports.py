"""contract/ imports with numpy alone: a tool that only reads manifests or packs requests needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import hstu_trt.contract

CONTRACT = Path(hstu_trt.contract.__file__).parent
MODULES = sorted(f"hstu_trt.contract.{path.stem}" for path in CONTRACT.glob("[!_]*.py"))

# Everything outside the standard library, numpy and our own contract is refused.
GUARD = """
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in sys.stdlib_module_names or top == "numpy" or top.startswith("__editable__")
        if not known and name != "hstu_trt" and not name.startswith("hstu_trt.contract"):
            raise ImportError(f"contract/ must not import {name}")

sys.meta_path.insert(0, Guard())
"""


def run(code):
    return subprocess.run([sys.executable, "-c", GUARD + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", ["torch", "onnx", "safetensors", "tritonclient", "hstu_trt.tables"])
def test_the_guard_guards(module):
    assert f"contract/ must not import {module}" in run(f"import {module}").stderr


def test_every_module_imports_with_numpy_alone():
    result = run("\n".join(f"import {module}" for module in MODULES))
    assert result.returncode == 0, result.stderr


def test_help_needs_numpy_alone():
    result = run("from hstu_trt.contract.cli import main; sys.exit(main(['--help']))")
    assert result.returncode == 0, result.stderr
