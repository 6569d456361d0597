"""The cuda runner's logic on a CPU, where plain PyTorch stands for the kernels: goldens, packing, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_models import cuda_model, fused_feed, fused_runner
from golden_cases import GOLDEN, GoldenCase, load_case
from numpy.typing import NDArray
from safetensors.torch import load_file

from hstu_trt.bench.chain import open_runner
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ConfigError, DeviceMemoryError, InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.split_users import one_user_feeds
from hstu_trt.contract.tensors import FUSED
from hstu_trt.engines.cuda import device_tables
from hstu_trt.engines.cuda.runner import CudaOptions, CudaRunner
from hstu_trt.plugins.layer_library import MAX_ACTIONS

CPU = CudaOptions(device="cpu")
CASES = ("caseA", "caseB", "caseB2", "caseB3")


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return load_case("caseB")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_fused_scores_of_the_goldens(name: str, precision: str) -> None:
    golden = load_case(name)
    scores = fused_runner(golden, precision, CPU).run(fused_feed(golden.request))["preds"]
    report = compare("preds", scores, golden.outputs["tc.out.preds"].numpy().T)
    assert report.passes(TOLERANCES["ranking_fused", precision]), report.text()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
def test_score_writes_the_goldens(exported: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    """Stage by stage, and with every layer's output."""
    out = tmp_path / "out.safetensors"
    inputs = ["--inputs", str(GOLDEN / "caseA/inputs.safetensors"), "--attention-norm", "batch_max", "--taps"]
    where = ["--runner", "cuda", "--device", "cpu", "--out", str(out)]
    assert main(["score", "--model", str(exported(precision)), *inputs, *where]) == 0
    found, expected = load_file(out), load_file(GOLDEN / "caseA/outputs.safetensors")
    stages = {"preds": "ranking", "user_embeddings": "hstu", **{f"stu.{n}.out": "stu" for n in range(3)}}
    for name, stage in stages.items():
        golden = expected["tc." + ("" if stage == "stu" else "out.") + name]
        report = compare(name, found[name].numpy(), golden.numpy())
        assert report.passes(TOLERANCES[stage, precision]), report.text()


def test_embedding_lookup_is_exact(exported: Callable[[str], Path]) -> None:
    model = read_model_folder(exported("fp16"))
    request = load_case("caseA").request
    feed = {spec.name: request[spec.name] for spec in model.specs["embedding_lookup"].inputs}
    with open_runner("cuda", model, "embedding_lookup", "cpu") as ours:
        with open_runner("torch", model, "embedding_lookup") as theirs:
            expected = theirs.infer(feed)
        for name, rows in ours.infer(feed).items():
            np.testing.assert_array_equal(rows, expected[name])


@pytest.mark.parametrize("max_tokens", [1, 60, 100_000])
def test_company_does_not_change_scores(case: GoldenCase, max_tokens: int) -> None:
    feed = fused_feed(case.request)
    users = list(one_user_feeds(feed))
    runner = fused_runner(case, "fp32", dataclasses.replace(CPU, max_tokens=max_tokens))
    alone = [runner.run(user)["preds"] for user in users]
    together = runner.run_many([users[3], feed, users[0]])
    for actual, expected in zip(together, (alone[3], np.concatenate(alone), alone[0]), strict=True):
        np.testing.assert_allclose(actual["preds"], expected, atol=1e-6, rtol=0)


def test_wide_tables_are_not_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tables become tables of an MLP's outputs, large ones go through the products: the scores agree."""
    golden = load_case("caseA")
    feed = fused_feed(golden.request)
    feed["candidate_ids"][0] = feed["uih_ids"][1] = 10**12
    folded = fused_runner(golden, "fp32", CPU).run(feed)["preds"]
    monkeypatch.setattr(device_tables, "FOLDED_ROWS", 0)
    plain = fused_runner(golden, "fp32", CPU).run(feed)["preds"]
    np.testing.assert_allclose(plain, folded, atol=2e-6)
    assert np.abs(plain - golden.outputs["tc.out.preds"].numpy().T).max() > 1e-4


def test_short_sequences_lose_their_context() -> None:
    """caseA's only contextual feature needs 20 events and candidates; one of its users has 12."""
    golden = load_case("caseA")
    feed = fused_feed(golden.request)
    lengths = np.diff(feed["uih_offsets"]) + np.diff(feed["candidate_offsets"])
    other = {**feed, "contextual_ids": (feed["contextual_ids"] + 1) % golden.config.table_of("user_id").rows}
    runner = fused_runner(golden, "fp32", CPU)
    moved = np.abs(runner.run(feed)["preds"] - runner.run(other)["preds"]).reshape(len(lengths), -1).max(axis=1)
    assert ((moved > 0) == (lengths >= 20)).all() and 0 < (lengths >= 20).sum() < len(lengths)


def test_a_wrong_feed_is_refused(exported: Callable[[str], Path]) -> None:
    model = read_model_folder(exported("fp32"))
    feed = fused_feed(load_case("caseA").request)
    with open_runner("cuda", model, FUSED, "cpu") as runner:
        with pytest.raises(InputError, match="'uih_offsets' ends with"):
            runner.infer({**feed, "uih_offsets": feed["uih_offsets"] + np.arange(5, dtype=np.int32)})
        with pytest.raises(InputError, match="tensor 'uih_ids' int64"):
            runner.infer({name: tensor for name, tensor in feed.items() if name != "uih_ids"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
@pytest.mark.faults
@pytest.mark.parametrize("stage", ["ranking_fused", "mlp_head"])
def test_a_gpu_without_free_memory_refuses_and_serves_on(
    exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    model = read_model_folder(exported("fp16"))
    feed = fused_feed(load_case("caseA").request)
    with CudaRunner(model, stage, CPU) as runner:
        if stage == "mlp_head":
            rows = {spec.name: spec for spec in runner.spec.inputs}
            width = {name: spec.dims[1] for name, spec in rows.items()}
            feed = {name: np.ones((3, width[name]), rows[name].dtype) for name in rows}
        expected = runner.infer(feed)["preds"]
        run = "run_many" if stage == FUSED else "run"

        def lacking(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

        with monkeypatch.context() as patched, pytest.raises(DeviceMemoryError, match=r"Tried to allocate 2.00 GiB.$"):
            patched.setattr(runner._stage, run, lacking)
            runner.infer_many([feed])
        assert np.array_equal(runner.infer(feed)["preds"], expected)


class LackingPipeline:
    """In place of a GPU's: no memory where the test says so."""

    depth = 3

    def __init__(self, lacks: str) -> None:
        self.lacks = lacks

    def _lack(self, where: str) -> None:
        if where == self.lacks:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

    def submit(self, users: object, bucket: object) -> str:
        self._lack("submit")
        return "slot"

    def compute(self, users: object, bucket: object, candidates: int) -> NDArray:
        self._lack("compute")
        return np.zeros((candidates, 1), np.float32)

    def collect(self, slot: str, candidates: int) -> NDArray:
        self._lack("collect")
        return np.zeros((candidates, 1), np.float32)

    def capture_next(self) -> None:
        self._lack("capture")


@pytest.mark.parametrize(("lacks", "alone"), [("submit", False), ("compute", True), ("collect", False)])
def test_a_micro_batch_names_the_lack_of_memory(monkeypatch: pytest.MonkeyPatch, lacks: str, alone: bool) -> None:
    runner = fused_runner(load_case("caseA"), "fp32", CPU)
    users = list(one_user_feeds(fused_feed(load_case("caseA").request)))
    monkeypatch.setattr(runner, "_pipeline", LackingPipeline(lacks))
    with pytest.raises(DeviceMemoryError, match=r"Tried to allocate 2.00 GiB.$"):
        runner.collect(runner.submit(users, alone=alone))
    monkeypatch.setattr(runner, "_pipeline", LackingPipeline("nothing"))
    assert len(runner.collect(runner.submit(users, alone=alone))) == len(users)


def test_no_memory_for_a_graph_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = fused_runner(load_case("caseA"), "fp32", CPU)
    monkeypatch.setattr(runner, "_pipeline", LackingPipeline("capture"))
    users = list(one_user_feeds(fused_feed(load_case("caseA").request)))
    assert len(runner.run_many(users)) == len(users)


def test_no_gpu_is_said_in_words(
    exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    inputs = ["--inputs", str(GOLDEN / "caseA/inputs.safetensors"), "--out", str(tmp_path / "o.safetensors")]
    assert main(["score", "--model", str(exported("fp16")), *inputs, "--runner", "cuda"]) == 2
    assert "PyTorch sees no CUDA GPU here" in capsys.readouterr().err


def test_models_beyond_the_runner(exported: Callable[[str], Path], tmp_path: Path) -> None:
    golden = load_case("caseA")
    many = dataclasses.replace(golden.config, action_weights=tuple(1 << n for n in range(MAX_ACTIONS + 1)))
    with pytest.raises(ConfigError, match="at most 12 kinds of actions; this has 13"):
        cuda_model(dataclasses.replace(golden, config=many), "fp32", CPU)


def test_quantised_tables_are_refused(exported: Callable[[str], Path], tmp_path: Path) -> None:
    model = read_model_folder(exported("fp32"))
    tables = tmp_path / "tables"
    assert main(["tables", "quantise", str(model.tables), "--to", "int8", "--out", str(tables)]) == 0
    assert json.loads((tables / "manifest.json").read_text())
    folder = dataclasses.replace(model, path=tmp_path)
    with pytest.raises(ConfigError, match="takes plain rows"):
        device_tables.load_tables(folder, torch.device("cpu"))
