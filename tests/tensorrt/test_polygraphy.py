"""Polygraphy's own command line with our plugins, as the README has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_trt.contract.cli import main
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.plugin_files import autoload_library
from hstu_trt.contract.tensors import FUSED

pytestmark = [pytest.mark.tensorrt, pytest.mark.gpu]


def nvinfer() -> str:
    """The library that Python's tensorrt has mapped."""
    import tensorrt

    assert tensorrt.__version__
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[-1] for line in lines if "libnvinfer.so" in line)


def test_polygraphy_compares_tensorrt_with_onnx_runtime(model: ModelFolder, tmp_path: Path) -> None:
    assert main(["bench", "polygraphy", "--model", str(model.path), "--requests", "16", "--out", str(tmp_path)]) == 0
    polygraphy = str(Path(sys.executable).with_name("polygraphy"))
    shapes = (tmp_path / "shapes.txt").read_text().split()
    options = ["--plugins", str(autoload_library()), "--strongly-typed", *shapes]
    options += ["--load-inputs", str(tmp_path / "inputs.json")]
    limits = ["--atol", str(TOLERANCES[FUSED, "fp16"].atol), "--rtol", "0"]
    command = [polygraphy, "run", str(model.onnx(FUSED)), "--trt", "--onnxrt", *options, *limits]
    # `run` loads plugins before it imports TensorRT, where the autoload library finds no registry to register in.
    environment = {**os.environ, "LD_PRELOAD": nvinfer()}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert "not registered" not in result.stderr
