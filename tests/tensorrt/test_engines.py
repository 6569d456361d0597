"""Engines with our plugins: built, run, compared, captured in CUDA graphs, loaded as version-compatible plans."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_runs import CapturedCall, op_nodes, other_lengths

from hstu_trt.bench.diff.runners import Options, measure
from hstu_trt.bench.diff.sides import Side
from hstu_trt.bench.polygraphy_feeds import FED_STAGES, feeds
from hstu_trt.bench.workloads.requests_source import Requests
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model_folder import TAPS, ModelFolder, read_model_folder
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.tensors import FUSED, STAGES

pytestmark = [pytest.mark.tensorrt, pytest.mark.gpu]
NORM = 128.0
PRECISIONS = ["fp16", "fp8"]


def open_trt(folder: Path, stage: str, model: ModelFolder):
    from hstu_trt.engines.tensorrt_runner import TensorRtRunner

    return TensorRtRunner(folder, stage, model)


def entries(folder: Path) -> dict:
    return {entry["stage"]: entry for entry in json.loads((folder / "manifest.json").read_text())["stages"]}


@pytest.mark.parametrize("stage", [*STAGES, FUSED, TAPS])
@pytest.mark.parametrize("precision", PRECISIONS, indirect=True)
def test_every_op_is_a_plugin_layer(built, model: ModelFolder, stage: str) -> None:
    expected = op_nodes(model.onnx(stage))
    assert entries(built())[stage]["details"]["plugin_layers"] == expected
    assert expected > 0 or stage == "mlp_head"


def test_nothing_is_built_twice(built, target: str, model: ModelFolder, capsys: pytest.CaptureFixture[str]) -> None:
    folder = built()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    source = ["--model", str(model.path), "--gpu", target, "--precision", "fp16", "--builder", "tensorrt"]
    stages = ",".join((*STAGES, FUSED, TAPS))
    capsys.readouterr()
    assert main(["engines", *source, "--stages", stages, "--out", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "up to date"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("stage", FED_STAGES)
@pytest.mark.parametrize("precision", PRECISIONS, indirect=True)
def test_a_stage_answers_as_onnx_runtime(built, model: ModelFolder, requests: Requests, stage: str) -> None:
    from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner

    with open_trt(built(), stage, model) as engine, OnnxRuntimeRunner(model, stage) as reference:
        for feed in feeds(model, stage, requests, NORM):
            expected = reference.infer(feed)
            for name, tensor in engine.infer(feed).items():
                key = "stu" if name.startswith("stu.") else "hstu" if stage == TAPS else stage
                report = compare(name, tensor, expected[name])
                assert report.passes(TOLERANCES[key, model.precision]), report.text()


def test_the_whole_model_ranks_as_pytorch(
    built, exported: Callable[[str], Path], model: ModelFolder, requests: Requests
) -> None:
    reference = Side(runner="torch", model=read_model_folder(exported("fp32"), verify=False))
    engine = Side(runner="tensorrt", model=model, engines=built())
    report = measure(reference, engine, requests, Options(norm=NORM))
    # The requests are too few for the gates on aggregates; those on outputs and on each request hold.
    assert all(output.passed for output in report.outputs), report.text()
    figures = [figure for task in report.tasks.values() for figure in task if figure.request is not None]
    assert figures and all(figure.passed for figure in figures), report.text()


def test_company_changes_no_score(built, model: ModelFolder, requests: Requests) -> None:
    """A user's scores alone and in a batch: another profile may round in another order, and no more."""
    (batch, *_), alone = feeds(model, FUSED, requests, NORM), []
    users = len(batch["uih_offsets"]) - 1
    with open_trt(built(), FUSED, model) as engine:
        together = engine.infer(batch)["preds"]
        for row in range(users):
            (one,) = feeds(model, FUSED, one_request(requests, row), NORM)
            alone.append(engine.infer(one)["preds"])
    assert compare("preds", np.concatenate(alone), together).max_abs <= TOLERANCES[FUSED, "fp16"].atol


def one_request(requests: Requests, row: int) -> Requests:
    return Requests(
        source="one",
        history_lengths=requests.history_lengths[row : row + 1],
        candidate_counts=requests.candidate_counts[row : row + 1],
        pack=lambda rows: requests.pack([row]),
    )


def test_a_bad_request_is_refused_and_the_engine_goes_on(built, model: ModelFolder, requests: Requests) -> None:
    (feed, *_) = feeds(model, "hstu", requests, NORM)
    wrong = {**feed, "candidate_offsets": feed["candidate_offsets"] + 1}
    with open_trt(built(), "hstu", model) as engine:
        first = engine.infer(feed)["user_embeddings"]
        with pytest.raises(InputError, match="candidate_offsets"):
            engine.infer(wrong)
        assert np.array_equal(engine.infer(feed)["user_embeddings"], first)


@pytest.mark.parametrize("stage", ["hstu", FUSED])
def test_a_cuda_graph_answers_for_the_request_at_hand(
    built, model: ModelFolder, requests: Requests, stage: str
) -> None:
    """A, B, A, B through one graph: offsets and values change between replays, shapes do not."""
    from hstu_trt.engines.engine_folder import make_context, open_engine, read_engine_file
    from hstu_trt.engines.hooks import BuildLog, make_logger
    from hstu_trt.engines.modules import TENSORRT, open_module

    a = next(feed for feed in feeds(model, stage, requests, NORM) if np.diff(feed["uih_offsets"]).max() > 1)
    b = other_lengths(a)
    trt, file = open_module(TENSORRT), read_engine_file(built(), stage, model)
    runtime, engine = open_engine(trt, make_logger(trt.module, BuildLog()), file, model)
    context = make_context(trt, engine, file, model)
    assert context is not None
    number = next(n for n, p in enumerate(file.profiles) if p.admits({k: v.shape for k, v in a.items()}))
    if number:
        import torch

        stream = torch.cuda.current_stream()
        assert context.set_optimization_profile_async(number, stream.cuda_stream)
        stream.synchronize()
    outputs = {spec.name: spec.dtype for spec in model.specs[stage].outputs}
    graph = CapturedCall(context, a, outputs)
    with open_trt(built(), stage, model) as eager:
        expected = [eager.infer(feed) for feed in (a, b)]
    name = next(iter(outputs))
    tolerance = TOLERANCES[stage, "fp16"]
    assert not compare(name, expected[0][name], expected[1][name]).passes(tolerance)
    for feed, wanted in ((a, expected[0]), (b, expected[1])) * 2:
        report = compare(name, graph.replay(feed)[name], wanted[name])
        assert report.passes(tolerance), report.text()
    del context, engine, runtime


def test_a_version_compatible_plan_loads_and_agrees(
    built, lean_runtime, model: ModelFolder, requests: Requests
) -> None:
    (feed, *_) = feeds(model, FUSED, requests, NORM)
    answers = []
    for folder in (built(), built("--version-compatible")):
        with open_trt(folder, FUSED, model) as engine:
            answers.append(engine.infer(feed)["preds"])
    assert compare("preds", answers[1], answers[0]).max_abs <= TOLERANCES[FUSED, "fp16"].atol
