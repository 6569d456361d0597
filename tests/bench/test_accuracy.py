"""The accuracy suite on stand-in runners (every gate can fail), and on the real ones."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hstu_trt.bench.accuracy import verb as accuracy
from hstu_trt.bench.accuracy.fidelity import Figure, Scores, task_figures
from hstu_trt.bench.accuracy.verb import Variant, measure
from hstu_trt.bench.workloads.generate import generate
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import user_batches
from hstu_trt.contract.cli import main
from hstu_trt.contract.gates import RANKING_GATES
from hstu_trt.contract.model import TaskConfig
from hstu_trt.contract.model_folder import ModelFolder

BINARY = TaskConfig(name="like", kind="binary")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, fake_runner, fake_model: ModelFolder):
    """``fakes(error)``: the reference, a three-stage twin and a fused one whose logits are off by ``error``."""
    errors = {"exact": 0.0}
    monkeypatch.setattr(
        accuracy, "open_runner", lambda kind, model, stage: fake_runner(model, stage, error=errors[kind])
    )

    def variants(error: float) -> list[Variant]:
        errors["off"] = error
        kinds = (("exact", False), ("off", False), ("off", True))
        return [Variant(kind=kind, model=fake_model, fused=fused) for kind, fused in kinds]

    return variants


def report_of(variants: list[Variant], requests: int = 20):
    profile = dataclasses.replace(PROFILES["ci"](), requests=requests)
    model = variants[0].model
    workload = generate(profile, model.ranking_config, limits=model.limits)
    return measure(variants, workload, norm=512.0, seed=1)


def test_alike_runners_pass(fakes) -> None:
    report = report_of(fakes(0.0))
    assert report.failures() == []
    assert {(f.variant, f.tensor) for f in report.tensors} == {
        ("off fp32 three stages", "preds"),
        ("off fp32 three stages", "user_embeddings"),
        ("off fp32 fused", "preds"),
    }
    assert json.loads(json.dumps(report.facts()))["passed"]
    assert "BEYOND" not in report.text()


def test_a_wrong_runner_fails_and_names_the_request(fakes) -> None:
    report = report_of(fakes(0.01))
    failures = "\n".join(report.failures())
    assert "off fp32 three stages, preds" in failures and "off fp32 fused, preds" in failures
    assert re.search(r"request_max_logit is 0\.0\d+, gate <= 0\.0001, worst in request \d+ \(slot 0", failures)
    assert "user_embeddings" not in failures
    assert "BEYOND" in report.text() and not report.facts()["passed"]


def test_a_runner_that_answers_nan_fails(fakes) -> None:
    report = report_of(fakes(float("nan")))
    assert not any(f.passed for f in report.tensors if f.tensor == "preds")
    assert "request_max_logit is nan" in "\n".join(report.failures())
    assert "NaN" not in json.dumps(report.facts())


def scores_of(p: np.ndarray, reference: np.ndarray, per_request: int) -> Scores:
    labels = (np.random.default_rng(0).random(reference.shape) < reference).astype(float)
    return Scores(p=p, reference=reference, labels=labels, offsets=np.arange(0, len(p) + 1, per_request))


def figures(scores: Scores, task: TaskConfig = BINARY) -> dict[str, Figure]:
    return {figure.name: figure for figure in task_figures(scores, task, "fp16", RANKING_GATES)}


def test_each_aggregate_gate_can_fail() -> None:
    reference = np.random.default_rng(1).uniform(0.1, 0.9, 8192)
    found = figures(scores_of(1 - reference, reference, 32))
    for name in ("entropy_change", "accuracy_ratio", "gauc_ratio", "request_max_logit"):
        assert not found[name].passed, name
    assert found["kendall_tau"].value == pytest.approx(-1)
    assert found["top_10_overlap"].value == 0


def test_long_requests_are_held_to_their_entropy() -> None:
    reference = np.random.default_rng(1).uniform(0.1, 0.9, 2048)
    p = reference.copy()
    p[512:1024] *= 0.97
    found = figures(scores_of(p, reference, 512))
    assert "request_max_logit" not in found
    assert found["request_entropy_change"].request == 1 and not found["request_entropy_change"].passed
    assert figures(scores_of(reference, reference, 512))["request_entropy_change"].value == 0


def test_regression_tasks_are_judged_by_rank_alone() -> None:
    values = np.random.default_rng(1).normal(size=64)
    found = figures(scores_of(values, values, 32), TaskConfig(name="watch", kind="regression"))
    assert set(found) == {"top_10_overlap", "kendall_tau"}


def test_batches_keep_to_the_limits(fake_model: ModelFolder) -> None:
    workload = generate(PROFILES["ci"](), fake_model.ranking_config, limits=fake_model.limits)
    limits = dataclasses.replace(fake_model.limits, users=5, batch_history=300, batch_candidates=100)
    batches = list(user_batches(workload, limits))
    assert [row for batch in batches for row in batch] == list(range(len(workload)))
    for batch in batches:
        assert len(batch) <= 3
        assert workload.history_lengths[batch].sum() <= 300


def test_real_runners(exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [part for p in ("fp32", "fp16", "fp8") for part in (f"--model-{p}", str(exported(p)))]
    arguments = ["bench", "accuracy", *models, "--out", str(tmp_path), "--requests", "24", "--json"]
    capsys.readouterr()  # what the exports said
    code = main(arguments)
    report = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "accuracy.json").read_text()) == report
    # Two dozen requests are too few for the aggregate gates, so only those per output and request count here.
    assert all(tensor["passed"] for tensor in report["tensors"]) and len(report["tensors"]) == 10
    assert all(m["passed"] for m in report["metrics"] if m["name"] == "request_max_logit")
    assert code == (0 if report["passed"] else 1)


def test_models_that_do_not_belong_together(
    exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp32 = str(exported("fp32"))
    assert main(["bench", "accuracy", "--model-fp32", fp32, "--model-fp16", fp32, "--out", str(tmp_path)]) == 2
    assert "fp16 is needed here" in capsys.readouterr().err


def test_workload_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "w")
    assert main(["bench", "workload", "--config", "debug", "--requests", "30", "--seed", "5", "--out", out]) == 0
    shown = capsys.readouterr().out
    assert "history length over 30 requests" in shown and "1 file(s)" in shown
    assert (tmp_path / "w" / "slot_000.npz").is_file()


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["--help"]])
def test_usage_names_the_suites(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == (0 if arguments == ["--help"] else 2)
    shown = capsys.readouterr()
    assert "accuracy" in shown.out + shown.err
