"""The TensorRT runner on stand-ins of module and driver: "engines" run ONNX Runtime on what the runner copied.

So names, shapes, dtypes, copies, growth and profiles are real; that a GPU computes the same only a GPU can show.
"""

import os

import numpy as np
import pytest
from fake_driver import H100
from stand_in_model import GRAPHS

from hstu_trt.bench.chain import open_runner
from hstu_trt.contract.errors import ConfigError, DeviceMemoryError, HstuTrtError, InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.runner import Runner
from hstu_trt.engines import engine_folder
from hstu_trt.engines.graphs import prepare
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.engines.tensorrt_runner import TensorRtRunner, default_folder

BATCHES = {
    "one user": ([5], [3]),
    "one user without history": ([0], [1]),
    "several": ([3, 1, 7], [2, 5, 1]),
    "an empty history first and last": ([0, 4, 0], [1, 3, 4]),
}


@pytest.fixture
def open_stage(engines, model, machine):
    def open_it(stage, folder=engines, model=model):
        driver, trt = machine
        return TensorRtRunner(folder, stage, model, driver=driver, trt=trt)

    return open_it


@pytest.mark.parametrize("stage", GRAPHS)
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


def test_users_run_together_with_the_plugin(exported, build_engines, machine, tmp_path, library):
    model = read_model_folder(exported("fp32"), verify=False)
    out = build_engines(model, tmp_path / "e", plugins=True, stages=("hstu",))
    driver, trt = machine
    with TensorRtRunner(out, "hstu", model, driver=driver, trt=trt) as runner:
        assert not runner._splits
        assert runner._context.environment["TABLES"] == str(model.tables)
    assert library.seen == [None, str(model.tables)], "where the tables are, the plugins of an engine are told"
    assert "TABLES" not in os.environ


def test_shapes_beyond_every_profile_are_refused(model, machine, tmp_path, make_feed, build_engines):
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


def test_a_stripped_plan_gets_its_weights_back(model, machine, tmp_path, make_feed, build_engines):
    out = build_engines(model, tmp_path / "stripped", strip_plan=True)
    driver, trt = machine
    with TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt) as runner:
        runner.infer(make_feed(runner.spec, [1], [2]))


@pytest.mark.parametrize("plugins", [False, True])
def test_a_stripped_plan_is_refitted_from_the_graph_it_was_parsed_from(
    model, machine, tmp_path, monkeypatch, library, plugins, build_engines
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
def test_host_code_is_allowed_for_version_compatible_plans_only(model, machine, tmp_path, allowed, build_engines):
    out = build_engines(model, tmp_path / "vc", version_compatible=allowed)
    driver, trt = machine
    with TensorRtRunner(out, "mlp_head", model, driver=driver, trt=trt) as runner:
        assert runner._runtime.engine_host_code_allowed == allowed


def test_the_command_line_finds_the_engines(model, machine, tmp_path, monkeypatch, make_feed, build_engines):
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
