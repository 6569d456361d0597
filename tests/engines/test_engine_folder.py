"""Which engines a runner opens: those of this model, this GPU and this version, undamaged. On stand-ins."""

import dataclasses
import json
import sys

import pytest
from fake_driver import L40S, FakeDriver
from fake_tensorrt import fake_module

from hstu_trt.bench.chain import open_runner
from hstu_trt.contract.errors import ArtefactError
from hstu_trt.engines.engine_folder import read_engine_file
from hstu_trt.engines.tensorrt_runner import TensorRtRunner


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("preds", "scores", "'preds' is None, the contract says .*'output', 'float32'"),
        (
            "float[candidates, 8]",
            "float16[candidates, 8]",
            "'candidate_embeddings' is .*'float16', .* says .*'float32'",
        ),
        ("float[candidates, 8]", "float[candidates, 9]", r"'candidate_embeddings' is .*\(-1, 9\)"),
    ],
)
def test_an_engine_that_is_not_the_contracts_is_refused(
    write_model, build_engines, machine, tmp_path, old, new, message
):
    text = """head (float[candidates, 4] user_embeddings, float[candidates, 8] candidate_embeddings)
      => (float[candidates, 1] preds) {
      axis1 = Constant<value = int64[1] {1}> ()
      a = ReduceSum<keepdims = 1> (user_embeddings, axis1)
      wide = Cast<to = 1> (candidate_embeddings)
      b = ReduceSum<keepdims = 1> (wide, axis1)
      preds = Add (a, b) }"""
    model = write_model({"mlp_head": text.replace(old, new)})
    out = build_engines(model, tmp_path / "e", stages=("mlp_head",))
    driver, trt = machine
    with pytest.raises(ArtefactError, match=message + r".*build it again with: hstu-trt engines"):
        TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt)


@pytest.mark.faults
def test_another_gpu_is_refused(engines, model, machine):
    _, trt = machine
    with pytest.raises(ArtefactError, match=r"is for compute capability 9.0; the GPU here is NVIDIA L40S \(8.9\)"):
        TensorRtRunner(engines, "mlp_head", model, driver=FakeDriver(L40S), trt=trt)


def test_ampere_plus_runs_elsewhere(model, machine, tmp_path, build_engines):
    out = build_engines(model, tmp_path / "any", hardware_compat="ampere_plus")
    _, trt = machine
    driver = FakeDriver(L40S)
    trt = dataclasses.replace(trt, module=fake_module(driver))
    with TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt):
        pass
    turing = FakeDriver(dataclasses.replace(L40S, compute_capability=75))
    with pytest.raises(ArtefactError, match=r"is for compute capability 9.0"):
        TensorRtRunner(out, "mlp_head", model, driver=turing, trt=trt)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("version", "compatible", "accepted"),
    [
        ("11.4.0.106", False, True),
        ("11.4.1.1", False, False),
        ("11.4.1.1", True, True),
        ("11.3.0.99", True, False),
        ("10.16.1.11", True, False),
    ],
)
def test_versions(model, machine, tmp_path, version, compatible, accepted, build_engines):
    out = build_engines(model, tmp_path / "e", version_compatible=compatible)
    driver, trt = machine
    trt = dataclasses.replace(trt, version=version)
    if accepted:
        with TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt):
            return
    with pytest.raises(ArtefactError, match=f"was built by TensorRT 11.4.0.106, {version} is installed; install"):
        TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt)


@pytest.mark.faults
def test_engines_of_another_export_are_refused(engines, write_model, graphs):
    other = write_model({"mlp_head": graphs["mlp_head"].replace("Add (a, b)", "Sub (a, b)")})
    with pytest.raises(ArtefactError, match=r"was built from another export than .*; build it again with: hstu-trt"):
        read_engine_file(engines, "mlp_head", other)


@pytest.mark.faults
def test_damaged_folders_are_refused(engines, model, tmp_path):
    with pytest.raises(ArtefactError, match=r"holds no engines .*hstu-trt engines --model"):
        read_engine_file(tmp_path / "nothing", "hstu", model)
    document = json.loads((engines / "manifest.json").read_text())
    few = {**document, "stages": [stage for stage in document["stages"] if stage["stage"] != "hstu"]}
    (engines / "manifest.json").write_text(json.dumps(few))
    with pytest.raises(ArtefactError, match="has no engine for stage hstu, but for embedding_lookup"):
        read_engine_file(engines, "hstu", model)
    (engines / "manifest.json").write_text(json.dumps({**document, "options": None}))
    with pytest.raises(ArtefactError, match="its manifest is malformed"):
        read_engine_file(engines, "hstu", model)
    (engines / "manifest.json").write_text(json.dumps(document))
    (engines / "hstu.plan").write_bytes(b"x")
    with pytest.raises(ArtefactError, match=r"hstu.plan has 1 bytes"):
        read_engine_file(engines, "hstu", model)


def test_a_plan_that_does_not_load_is_an_error(engines, model, machine):
    document = json.loads((engines / "manifest.json").read_text())
    (engines / "hstu.plan").write_bytes(b"null")
    digest = "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b"
    document["files"]["hstu.plan"] = {"bytes": 4, "sha256": digest}
    (engines / "manifest.json").write_text(json.dumps(document))
    driver, trt = machine
    with pytest.raises(ArtefactError, match=r"hstu.plan: TensorRT cannot load it; build it again with"):
        TensorRtRunner(engines, "hstu", model, driver=driver, trt=trt)


def test_the_other_librarys_engines_are_refused(engines, model, machine, monkeypatch):
    driver, _ = machine
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_module(driver, version="1.7.1.116"))
    with pytest.raises(ArtefactError, match="was built by tensorrt, not tensorrt_rtx: take that runner"):
        open_runner("tensorrt_rtx", model, "hstu", engines=engines)
