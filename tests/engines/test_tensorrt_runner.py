"""The TensorRT runner on stand-ins of module and driver: "engines" run ONNX Runtime on what the runner copied.

So names, shapes, dtypes, copies, growth and profiles are real; that a GPU computes the same only a GPU can show.
"""

import dataclasses
import json
import os
import sys
import types

import numpy as np
import pytest
from fake_tensorrt import H100, L40S, FakeDriver, fake_module

import hstu_trt.plugins
from hstu_trt.bench.chain import open_runner
from hstu_trt.contract.errors import ArtefactError, ConfigError, DeviceMemoryError, HstuTrtError, InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.ops import OPS
from hstu_trt.contract.runner import Runner
from hstu_trt.engines import engine_folder, tensorrt_builder, tensorrt_runner
from hstu_trt.engines.build import build, make_plan
from hstu_trt.engines.builders import BuildOptions
from hstu_trt.engines.engine_folder import read_engine_file
from hstu_trt.engines.graphs import prepare
from hstu_trt.engines.modules import TENSORRT, TensorRt
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.engines.tensorrt_runner import TensorRtRunner, default_folder

STAGES = ["embedding_lookup", "hstu", "mlp_head", "ranking_fused", "hstu_taps"]
BATCHES = {
    "one user": ([5], [3]),
    "one user without history": ([0], [1]),
    "several": ([3, 1, 7], [2, 5, 1]),
    "an empty history first and last": ([0, 4, 0], [1, 3, 4]),
}


@pytest.fixture
def machine(monkeypatch):
    """A machine with an H100 and TensorRT: (driver, library)."""
    driver = FakeDriver()
    module = fake_module(driver)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(tensorrt_builder, "current_device", driver.device)
    monkeypatch.setattr(tensorrt_runner, "CudaDriver", lambda: driver)
    return driver, TensorRt(flavour=TENSORRT, module=module, version=module.__version__)


def build_engines(model, out, **options):
    options = {"plugins": False, "stages": STAGES, **options}
    plan = make_plan(model.path, "h100", "fp32", out, options=BuildOptions(**options), cache=out.parent / "cache")
    build(plan)
    return out


@pytest.fixture
def engines(model, machine, tmp_path):
    return build_engines(model, tmp_path / "engines")


@pytest.fixture
def open_stage(engines, model, machine):
    def open_it(stage, folder=engines, model=model):
        driver, trt = machine
        return TensorRtRunner(folder, stage, model, driver=driver, trt=trt)

    return open_it


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_answers_as_onnx_runtime_does(open_stage, model, make_feed, machine, stage):
    """The same runner for all batches: short after long, so that stale bytes would show."""
    driver, _ = machine
    expected = OnnxRuntimeRunner(model, stage, threads=1)
    with open_stage(stage) as runner:
        assert isinstance(runner, Runner)
        for batch in (*BATCHES.values(), *reversed(BATCHES.values())):
            feed = make_feed(runner.spec, *batch)
            answer, wanted = runner.infer(feed), expected.infer(feed)
            assert list(answer) == list(wanted)
            for name, value in wanted.items():
                assert answer[name].dtype == value.dtype
                np.testing.assert_array_equal(answer[name], value, err_msg=name)
    assert not driver.live, "all memory and the stream are given back"
    assert not driver.current


def test_answers_outlive_the_next_call(open_stage, make_feed):
    with open_stage("mlp_head") as runner:
        first = runner.infer(make_feed(runner.spec, [2], [3], seed=1))["preds"]
        kept = first.copy()
        runner.infer(make_feed(runner.spec, [2], [3], seed=2))
        np.testing.assert_array_equal(first, kept)


def test_buffers_are_used_again_and_grow(open_stage, make_feed, machine):
    driver, _ = machine
    with open_stage("embedding_lookup") as runner:
        runner.infer(make_feed(runner.spec, [16] * 4, [8] * 4))
        largest = driver.allocations
        for lengths in ([16] * 4, [1], [3, 2]):
            runner.infer(make_feed(runner.spec, lengths, [1] * len(lengths)))
        assert driver.allocations == largest
        held = len(driver.live)
        runner.infer(make_feed(runner.spec, [16] * 4, [8] * 4))
        assert len(driver.live) == held


def test_the_profile_follows_the_shapes(open_stage, make_feed):
    """One candidate fits both profiles: the first, ``single``, is tuned for it."""
    with open_stage("mlp_head") as runner:
        for candidates in ([1], [8], [8, 8], [3], [4]):
            runner.infer(make_feed(runner.spec, [1] * len(candidates), candidates))
        assert runner._context.switches == [0, 1, 0]


def test_users_run_one_by_one_without_the_plugin(open_stage, make_feed):
    with open_stage("hstu") as runner:
        runner.infer(make_feed(runner.spec, [3, 0, 2], [1, 1, 1]))
        assert runner._context.shapes["uih_offsets"] == (2,)
        assert runner._context.switches == [0]


@pytest.fixture
def plugin_face(tmp_path, monkeypatch):
    """A plugin library in place of ours; a list of where the tables were, each time that it was loaded."""
    creators = {(op.name, op.version, op.domain) for op in OPS.values()}
    path = tmp_path / "plugins.so"
    path.write_bytes(b"plugins")
    seen = []
    face = types.SimpleNamespace(
        plugin_library=lambda: path,
        load_plugins=lambda registry: (registry.creators.update(creators), seen.append(os.environ.get("TABLES"))),
        TABLES_VARIABLE="TABLES",
    )
    monkeypatch.setattr(hstu_trt.plugins, "trt_library", face, raising=False)
    monkeypatch.delenv("TABLES", raising=False)
    return seen


def test_users_run_together_with_the_plugin(exported, machine, tmp_path, plugin_face):
    seen = plugin_face
    model = read_model_folder(exported("fp32"), verify=False)
    out = build_engines(model, tmp_path / "e", plugins=True, stages=("hstu",))
    driver, trt = machine
    with TensorRtRunner(out, "hstu", model, driver=driver, trt=trt) as runner:
        assert not runner._splits
        assert runner._context.environment["TABLES"] == str(model.tables)
    assert seen == [None, str(model.tables)], "where the tables are, the plugins of an engine are told"
    assert "TABLES" not in os.environ


def test_shapes_beyond_every_profile_are_refused(model, machine, tmp_path, make_feed):
    out = build_engines(model, tmp_path / "narrow", profiles=("small:candidates=1/2/3",))
    driver, trt = machine
    with TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt) as runner:
        runner.infer(make_feed(runner.spec, [1], [3]))
        with pytest.raises(InputError, match=r"no profile of .* takes user_embeddings \[4, 4\].*small: .*--profile"):
            runner.infer(make_feed(runner.spec, [1], [4]))


def test_a_wrong_feed_is_refused(open_stage, make_feed):
    with open_stage("hstu") as runner:
        feed = make_feed(runner.spec, [3, 2], [1, 1])
        with pytest.raises(InputError, match="'uih_offsets' ends with 4"):
            runner.infer({**feed, "uih_offsets": np.asarray([0, 3, 4], np.int32)})
        with pytest.raises(InputError, match="takes no tensor 'more'"):
            runner.infer({**feed, "more": np.zeros(1, np.float32)})


def test_a_failing_engine_is_an_error(open_stage, make_feed):
    with open_stage("mlp_head") as runner:
        runner._context.fails = True
        with pytest.raises(HstuTrtError, match=r"mlp_head.plan: the engine failed: TensorRT gave no reason"):
            runner.infer(make_feed(runner.spec, [1], [1]))


@pytest.mark.faults
@pytest.mark.parametrize("failing", ["an input", "an output"])
def test_a_gpu_without_free_memory_refuses_and_serves_on(open_stage, make_feed, machine, monkeypatch, failing):
    """A request that was answered before is so again; the large one too, once there is memory."""
    driver, _ = machine
    allocate, is_output = driver.allocate, []

    def lacking(size):
        if (failing == "an output") == bool(is_output):
            raise DeviceMemoryError("CUDA driver: cuMemAlloc_v2 failed with error 2: out of memory")
        return allocate(size)

    with open_stage("mlp_head") as runner:
        small, large = make_feed(runner.spec, [2], [1]), make_feed(runner.spec, [2], [30])
        expected = runner.infer(small)["preds"]
        reallocate = type(runner._outputs).reallocate_output

        def noted(*arguments):
            is_output.append(True)
            try:
                return reallocate(*arguments)
            finally:
                is_output.clear()

        monkeypatch.setattr(type(runner._outputs), "reallocate_output", noted)
        monkeypatch.setattr(driver, "allocate", lacking)
        runner._buffers.close() if failing == "an output" else None
        with pytest.raises(DeviceMemoryError, match="out of memory"):
            runner.infer(large)
        monkeypatch.setattr(driver, "allocate", allocate)
        assert np.array_equal(runner.infer(small)["preds"], expected)
        assert runner.infer(large)["preds"].shape == (30, 1)


def test_a_stripped_plan_gets_its_weights_back(model, machine, tmp_path, make_feed):
    out = build_engines(model, tmp_path / "stripped", strip_plan=True)
    driver, trt = machine
    with TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt) as runner:
        runner.infer(make_feed(runner.spec, [1], [2]))


@pytest.mark.parametrize("plugins", [False, True])
def test_a_stripped_plan_is_refitted_from_the_graph_it_was_parsed_from(
    model, machine, tmp_path, monkeypatch, plugin_face, plugins
):
    """Of a stage without ops too, whose engine has no plugin layer either way."""
    seen = []

    def spy(*arguments, plugins):
        seen.append(plugins)
        return prepare(*arguments, plugins=plugins)

    out = build_engines(model, tmp_path / "stripped", strip_plan=True, stages=("mlp_head",), plugins=plugins)
    monkeypatch.setattr(engine_folder, "prepare", spy)
    driver, trt = machine
    with TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt):
        assert seen == [plugins]


@pytest.mark.parametrize("allowed", [False, True])
def test_host_code_is_allowed_for_version_compatible_plans_only(model, machine, tmp_path, allowed):
    out = build_engines(model, tmp_path / "vc", version_compatible=allowed)
    driver, trt = machine
    with TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt) as runner:
        assert runner._runtime.engine_host_code_allowed == allowed


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
def test_an_engine_that_is_not_the_contracts_is_refused(write_model, graphs, machine, tmp_path, old, new, message):
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


def test_ampere_plus_runs_elsewhere(model, machine, tmp_path):
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
def test_versions(model, machine, tmp_path, version, compatible, accepted):
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


def test_the_command_line_finds_the_engines(model, machine, tmp_path, monkeypatch, make_feed):
    monkeypatch.chdir(tmp_path)
    folder = default_folder(model, "tensorrt", H100.name)
    assert str(folder) == "build/engines/h100/stand-in/fp32"
    build_engines(model, tmp_path / folder)
    with open_runner("tensorrt", model, "mlp_head") as runner:
        runner.infer(make_feed(runner.spec, [1], [2]))
    with open_runner("tensorrt", model, "mlp_head", engines=tmp_path / folder) as runner:
        runner.infer(make_feed(runner.spec, [1], [2]))
    with pytest.raises(ConfigError, match=r"no preset is the GPU here \(NVIDIA GB10\); name a folder .*--engines"):
        default_folder(model, "tensorrt", "NVIDIA GB10")


def test_the_other_librarys_engines_are_refused(engines, model, machine, monkeypatch):
    driver, _ = machine
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_module(driver, version="1.7.1.116"))
    with pytest.raises(ArtefactError, match="was built by tensorrt, not tensorrt_rtx: take that runner"):
        open_runner("tensorrt_rtx", model, "hstu", engines=engines)
