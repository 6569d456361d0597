"""The accuracy harness of the cuda runner, in small on a CPU: its reference, its gates, and the planner's way out."""

import dataclasses

import numpy as np
import pytest
import torch

import hstu_trt.export.torch_ops  # noqa: F401 - attention without a GPU
from hstu_trt.bench.accuracy import gpu as gpu_accuracy
from hstu_trt.bench.accuracy.fidelity import Figure
from hstu_trt.bench.accuracy.gpu import Bench, Judged, Plan, judge_all, missed, rows_of, table
from hstu_trt.bench.model.cases import ModelCase, RandomModel, device_tables, requests
from hstu_trt.bench.model.references import TorchModel
from hstu_trt.bench.result_rows import Provenance
from hstu_trt.bench.workloads.lengths import ConstLengths
from hstu_trt.bench.workloads.profiles import gpu_point
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import default_limits

PLAN = Plan(weights=("random",), requests=6, device="cpu")


def small_case() -> ModelCase:
    config = debug()
    tables = tuple(dataclasses.replace(table, rows=200) for table in config.tables)
    profile = dataclasses.replace(gpu_point(), lengths=ConstLengths(value=20), candidates=(40,))
    config = dataclasses.replace(config, tables=tables)
    return ModelCase(name="small", config=config, profile=profile)


@pytest.fixture(scope="module")
def case():
    return small_case()


@pytest.fixture(scope="module")
def feeds(case):
    return requests(case, PLAN.requests)


@pytest.fixture(scope="module")
def tables(case):
    return device_tables(case.config, torch.device("cpu"))


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_the_blocked_reference_is_the_dense_one(case, feeds, tables, block):
    weights = RandomModel(case.config).weights("fp32")
    dense, blocked = (TorchModel(case.config, weights, "fp32", tables, name, "cpu") for name in ("dense", "blocked"))
    blocked._model._hstu_transducer._stu_module.forward._block = block
    for feed in feeds[:2]:
        torch.testing.assert_close(blocked.scores(feed), dense.scores(feed), atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", gpu_accuracy.WEIGHTS)
def test_both_precisions_are_judged(case, feeds, tables, kind):
    bench = Bench(case, kind, feeds, tables, PLAN)
    for precision in ("fp32", "fp16", "fp8"):
        judged = bench.judge(precision)
        values = {figure.name: figure.value for figure in judged.figures}
        assert values["max_abs"] <= {"fp32": 2e-5, "fp16": 4e-3, "fp8": 0.24}[precision]
        assert {"entropy_change", "accuracy_ratio", "gauc_ratio", "request_max_logit"} <= values.keys()
        assert bool(judged.sites) == (precision == "fp8")
    assert "entropy_change" in table([judged])


def test_wrong_scores_miss_the_gates(case, feeds, tables, monkeypatch):
    bench = Bench(case, "random", feeds, tables, PLAN)
    right = bench._scores
    monkeypatch.setattr(bench, "_scores", lambda *a: ([1 - part for part in right(*a)[0]], 1.0))
    assert {text.split()[4] for text in bench.judge("fp16").failures} >= {"entropy_change", "gauc_ratio"}


class Planned:
    """A model that keeps the gates only where ``bad`` is not in fp8."""

    sites = ("a", "bad", "c")

    def judge(self, precision, sites=None, name=""):
        kept = precision != "fp8" or "bad" not in (self.sites if sites is None else sites)
        figure = Figure(name="entropy_change", value=1e-4 if kept else 1.0, gate=1e-3)
        return Judged(variant=name or f"cuda {precision}", figures=(figure,), us=1.0, sites=tuple(sites or self.sites))

    def trial(self, name, sites, gates):
        figure = Figure(name="entropy_change", value=1.0 if "bad" in sites else 1e-4 * len(sites), gate=1e-3)
        return gpu_accuracy.Trial(name=name, sites=tuple(sites), share=len(sites) / 3, figures=(figure,))


def test_the_planner_is_asked_where_fp8_misses_a_gate():
    judged = judge_all(Planned(), PLAN)
    assert [one.variant for one in judged] == ["cuda fp16", "cuda fp8", "cuda fp8, as planned"]
    assert judged[2].sites == ("a", "c") and judged[1].failures and not missed(judged)
    assert missed(judged[:2]), "a gate that nothing keeps fails the run"


def test_rows_name_the_gates(case, feeds):
    provenance = Provenance.here("a GPU", {}, "abc")
    (row,) = rows_of(case, [Planned().judge("fp8")], feeds, provenance)
    assert row.checks["gates_failed"] == 1 and row.checks["requests"] == len(feeds)
    assert row.details["fp8"] == ["a", "bad", "c"] and np.isfinite(row.tflops)
    assert default_limits(case.config).candidates >= 40
