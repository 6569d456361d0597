"""The cuda runner on a GPU: the goldens through kernels and graphs, and the same bits in any company."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_models import fused_feed, fused_runner
from golden_cases import GOLDEN, load_case
from safetensors.torch import load_file

from hstu_trt.bench.model.cases import ModelCase, device_tables, random_weights, requests
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.presets import dlrm_v3
from hstu_trt.contract.split_users import one_user_feeds
from hstu_trt.engines.cuda.runner import CudaModel, CudaOptions, FusedRunner
from hstu_trt.plugins.layer_library import load_layer_library

pytestmark = pytest.mark.gpu
CASES = ("caseA", "caseB", "caseB2", "caseB3")


@pytest.fixture(autouse=True)
def kernels() -> None:
    try:
        load_layer_library()
    except ArtefactError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_fused_scores_of_the_goldens(name: str, precision: str) -> None:
    golden = load_case(name)
    runner = fused_runner(golden, precision, CudaOptions())
    feed = fused_feed(golden.request)
    expected = golden.outputs["tc.out.preds"].numpy().T
    for users in ([feed], list(one_user_feeds(feed))):
        for _ in range(2):
            scores = np.concatenate([answer["preds"] for answer in runner.run_many(users)])
            report = compare("preds", scores, expected)
            assert report.passes(TOLERANCES["ranking_fused", precision]), report.text()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp8"])
def test_hidden_states_of_the_goldens(exported: Callable[[str], Path], tmp_path: Path, precision: str) -> None:
    out = tmp_path / "out.safetensors"
    inputs = ["--inputs", str(GOLDEN / "caseA/inputs.safetensors"), "--attention-norm", "batch_max", "--taps"]
    arguments = ["--model", str(exported(precision)), *inputs, "--runner", "cuda", "--out", str(out)]
    assert main(["score", *arguments]) == 0
    found, expected = load_file(out), load_file(GOLDEN / "caseA/outputs.safetensors")
    for name, stage in {"user_embeddings": "hstu", **{f"stu.{n}.out": "stu" for n in range(3)}}.items():
        golden = expected["tc." + ("" if stage == "stu" else "out.") + name]
        report = compare(name, found[name].numpy(), golden.numpy())
        assert report.passes(TOLERANCES[stage, precision]), report.text()


def wide_case() -> ModelCase:
    """dlrm_v3's widths, which the fp8 product is made for, with small tables and two layers."""
    config: HstuConfig = dlrm_v3()
    tables = tuple(dataclasses.replace(table, rows=min(table.rows, 5000)) for table in config.tables)
    config = dataclasses.replace(config, layers=2, tables=tables)
    profile = dataclasses.replace(PROFILES["gpu_ecom"](), candidates=(100, 512))
    return ModelCase(name="wide", config=config, profile=profile)


@pytest.fixture(scope="module", params=["fp16", "fp8"])
def wide(request: pytest.FixtureRequest) -> tuple[CudaModel, ModelCase, str]:
    case = wide_case()
    tables = device_tables(case.config, torch.device("cuda"))
    weights = random_weights(case.config, ["fp16", request.param])[request.param]
    model = CudaModel(case.config, weights.dense, request.param, tables, CudaOptions(max_tokens=8192))
    return model, case, request.param


def test_bits_do_not_change_in_a_bucket(wide: tuple[CudaModel, ModelCase, str]) -> None:
    """The same run twice, and users in another order: no kernel's work on a row depends on the others'."""
    model, case, _ = wide
    feeds = requests(case, 40)
    runner = FusedRunner(model, case.limits)
    first = [answer["preds"] for answer in runner.run_many(feeds)]
    again = [answer["preds"] for answer in runner.run_many(feeds)]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    pair = feeds[:2]
    forwards, backwards = runner.run_many(pair), runner.run_many(pair[::-1])[::-1]
    for a, b in zip(forwards, backwards, strict=True):
        np.testing.assert_array_equal(a["preds"], b["preds"])


def test_company_changes_little(wide: tuple[CudaModel, ModelCase, str]) -> None:
    """Another bucket may take another algorithm of cuBLAS: fp16 sums in another order."""
    model, case, precision = wide
    feeds = requests(case, 40)
    runner = FusedRunner(model, case.limits)
    together = runner.run_many(feeds)
    allowed = {"fp16": 2e-3, "fp8": 2e-2}[precision]
    for feed, answer in zip(feeds, together, strict=True):
        assert np.abs(runner.run(feed)["preds"] - answer["preds"]).max() < allowed


def test_a_run_that_raised_does_no_harm(
    wide: tuple[CudaModel, ModelCase, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are then on their way that nobody collects, and their slots are written anew."""
    model, case, _ = wide
    feeds = requests(case, 40)
    runner = FusedRunner(model, case.limits)
    together, alone = runner.run_many(feeds), runner.run(feeds[0])

    def fail(*_: object) -> None:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(runner.pipeline, "collect", fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            runner.run_many(feeds)
    np.testing.assert_array_equal(runner.run(feeds[0])["preds"], alone["preds"])
    for a, b in zip(runner.run_many(feeds), together, strict=True):
        np.testing.assert_array_equal(a["preds"], b["preds"])
