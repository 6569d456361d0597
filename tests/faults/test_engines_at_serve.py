"""``hstu-trt serve`` on engines for another GPU or of another TensorRT: what its operator is told, before any launch.

On stand-ins of TensorRT's module, its backend in Triton and the GPU; files, manifests and the command are real.
"""

import dataclasses
import sys
import types

import pytest
from fake_driver import H100, L40S

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.manifest import write_manifest
from hstu_trt.contract.plugin_files import AUTOLOAD_LIBRARY, PLUGIN_LIBRARY
from hstu_trt.serving import engine_steps, serve
from hstu_trt.serving.assemble import Options, assemble

pytestmark = pytest.mark.faults
VERSION = "11.4.0.106"
COMMAND = "hstu-trt engines --model M --gpu h100 --precision fp32 --out E"


@pytest.fixture(scope="module")
def of_plans(deployment, tmp_path_factory):
    """A deployment of engines for an H100."""
    folder = tmp_path_factory.mktemp("plans") / "engines"
    folder.mkdir()
    stages = ("hstu", "mlp_head", "ranking_fused")
    for stage in stages:
        (folder / f"{stage}.plan").write_text(f"plan of {stage}")
    profile = {"name": "single", "dims": {}, "shapes": {}}
    details = {"profiles": [profile], "plugin_layers": 1}
    facts = {
        "builder": "tensorrt",
        "model": {"digest": deployment.model.digest},
        "stages": [{"stage": stage, "file": f"{stage}.plan", "details": details} for stage in stages],
        "options": {},
        "versions": {"tensorrt": VERSION},
        "compute_capabilities": [H100.compute_capability],
    }
    files = [f"{stage}.plan" for stage in stages]
    write_manifest(folder, kind="engines", made_by=COMMAND, files=files, facts=facts)
    return assemble(deployment.model, folder.parent / "deployment", Options(flavour="tensorrt", engines=folder))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """``machine(version, gpu)`` is the options that ``serve`` needs on it; instead of a launch it returns a word."""
    files = ["bin/tritonserver", "backends/tensorrt/libtriton_tensorrt.so", PLUGIN_LIBRARY, AUTOLOAD_LIBRARY]
    for path in (tmp_path / name for name in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        path.chmod(0o755)
    monkeypatch.setattr(serve, "_serve", lambda *given: "launched")

    def make(version, gpu):
        monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__=version))
        monkeypatch.setattr(engine_steps, "current_device", lambda: gpu)
        server = ["--tritonserver", tmp_path / "bin/tritonserver", "--plugins", tmp_path / AUTOLOAD_LIBRARY]
        return [*map(str, server), "--grpc-port", "0", "--run", str(tmp_path / "run")]

    return make


def served(of_plans, options):
    return run_verb(serve.main, ["--deployment", str(of_plans.path), *options], "hstu-trt serve")


def test_the_machine_that_they_were_built_for(of_plans, machine):
    assert served(of_plans, machine(VERSION, H100)) == "launched"


WRONG = {
    "another GPU": ((VERSION, L40S), "is for compute capability 9.0; the GPU here is NVIDIA L40S (8.9); build"),
    "an older GPU": (
        (VERSION, dataclasses.replace(L40S, name="T4", compute_capability=75)), "the GPU here is T4 (7.5); build eng",
    ),
    "a later patch": (("11.4.1.1", H100), f"was built by TensorRT {VERSION}, 11.4.1.1 is installed; install"),
    "another major": (("10.16.1.11", H100), f"or build it again with: {COMMAND}"),
    "too old": (("10.3.0", H100), "TensorRT 10.3.0 is installed; this needs 10.15 or later"),
}  # fmt: skip


@pytest.mark.parametrize(("here", "said"), WRONG.values(), ids=WRONG)
def test_others_are_told_before_the_launch(of_plans, machine, capsys, here, said):
    assert served(of_plans, machine(*here)) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.splitlines()) <= 2


def test_a_machine_without_a_gpu_is_told(of_plans, machine, capsys, monkeypatch):
    from hstu_trt.engines import cuda_driver

    options = machine(VERSION, H100)
    monkeypatch.setattr(engine_steps, "current_device", cuda_driver.current_device)
    monkeypatch.setattr(cuda_driver, "_LIBRARY", "libno_such_cuda.so.1")
    assert served(of_plans, options) == 2
    assert "no CUDA GPU here" in capsys.readouterr().err


def test_an_engine_that_was_swapped_since_is_told(of_plans, machine, capsys):
    """The fused model runs it from the folder that ``assemble`` was given, which is not the deployment's own."""
    plan = (of_plans.path / "engines").resolve() / "ranking_fused.plan"
    good = plan.read_bytes()
    plan.write_bytes(good[::-1])
    try:
        assert served(of_plans, machine(VERSION, H100)) == 2
    finally:
        plan.write_bytes(good)
    assert f"{plan} does not match the sha256 in its manifest" in capsys.readouterr().err
