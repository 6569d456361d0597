"""A model folder of stand-ins, and machines with a stand-in of TensorRT, its plugin library and a GPU."""

import os
import sys
import types

import pytest
from fake_driver import H100, FakeDriver
from fake_tensorrt import fake_module
from stand_in_model import GRAPHS, make_feed, write_stand_in

import hstu_trt.plugins
from hstu_trt.contract.cli import main as command_line
from hstu_trt.contract.ops import OPS
from hstu_trt.engines import tensorrt_builder, tensorrt_runner
from hstu_trt.engines.build import build, make_plan
from hstu_trt.engines.builders import BuildOptions
from hstu_trt.engines.modules import TENSORRT, TensorRt

CREATORS = {(op.name, op.version, op.domain) for op in OPS.values()}


@pytest.fixture
def model(tmp_path):
    return write_stand_in(tmp_path / "model")


@pytest.fixture
def write_model(tmp_path):
    """Writes a stand-in with some graphs replaced."""
    return lambda graphs=None: write_stand_in(tmp_path / "other", graphs)


@pytest.fixture
def graphs():
    return GRAPHS


@pytest.fixture(name="make_feed")
def make_feed_fixture():
    return make_feed


@pytest.fixture
def golden_folder(exported):
    return exported("fp16")


@pytest.fixture
def module(golden_folder, monkeypatch):
    module = fake_module()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A plugin library in place of ours, with both creators; ``seen``: where the tables were at each loading of it."""
    path, seen = tmp_path / "libhstu_trt_plugins.so", []
    path.write_bytes(b"plugins")
    face = types.SimpleNamespace(
        plugin_library=lambda: path,
        load_plugins=lambda registry: (registry.creators.update(CREATORS), seen.append(os.environ.get("TABLES"))),
        TABLES_VARIABLE="TABLES",
        seen=seen,
    )
    monkeypatch.setattr(hstu_trt.plugins, "trt_library", face, raising=False)
    monkeypatch.delenv("TABLES", raising=False)
    return face


@pytest.fixture
def gpu(monkeypatch):
    """Puts a GPU into the machine; the H100 is there already."""

    def place(device):
        monkeypatch.setattr(tensorrt_builder, "current_device", lambda: device)

    place(H100)
    return place


@pytest.fixture
def build_golden(golden_folder, module, library, gpu, tmp_path):
    """Runs ``hstu-trt engines`` on the golden model in fp16; returns the exit code."""

    def run(*more, target="h100"):
        words = ["--model", golden_folder, "--gpu", target, "--precision", "fp16", "--cache", tmp_path / "cache"]
        return command_line([str(word) for word in ["engines", *words, "--out", tmp_path / "e", *more]])

    return run


@pytest.fixture
def machine(monkeypatch):
    """A machine with an H100 and TensorRT: (driver, library)."""
    driver = FakeDriver()
    module = fake_module(driver)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(tensorrt_builder, "current_device", driver.device)
    monkeypatch.setattr(tensorrt_runner, "CudaDriver", lambda: driver)
    return driver, TensorRt(flavour=TENSORRT, module=module, version=module.__version__)


@pytest.fixture
def build_engines(machine):
    """``build_engines(model, out, refit=True, ...)`` builds a stand-in's engines there; by default all, no plugins."""

    def build_them(model, out, **options):
        options = {"plugins": False, "stages": tuple(GRAPHS), **options}
        plan = make_plan(model.path, "h100", "fp32", out, options=BuildOptions(**options), cache=out.parent / "cache")
        build(plan)
        return out

    return build_them


@pytest.fixture
def engines(model, build_engines, tmp_path):
    return build_engines(model, tmp_path / "engines")
