"""The demo's judgement: a check that fails is told and ends in exit code 1. The README's test runs the whole road."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from hstu_trt.bench import demo as whole_road
from hstu_trt.bench.demo import Demo, accuracy_summary, finish, report
from hstu_trt.bench.load.traffic import Answers
from hstu_trt.bench.workloads.generate import generate
from hstu_trt.bench.workloads.profiles import ci
from hstu_trt.contract import cli
from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import ENSEMBLE, FUSED

MODEL = SimpleNamespace(ranking_config=debug(), precision="fp32")


@pytest.fixture
def demo(tmp_path):
    return Demo(out=tmp_path, requests=4)


@pytest.fixture(scope="module")
def workload():
    return generate(ci(), debug()).take(range(4))


def scores_of(workload):
    return np.random.default_rng(0).random((len(workload.cand_item), 1)).astype(np.float32)


def answers_with(workload, scores, error=0.0):
    parts = np.split(scores, workload.cand_off[1:-1])
    return {
        name: Answers(clients=1, scores=[part + wrong for part in parts], latency_ms=np.arange(4.0), seconds=2.0)
        for name, wrong in ((ENSEMBLE, np.float32(0)), (FUSED, np.float32(error)))
    }


def test_scores_that_agree_pass(demo, workload, capsys):
    scores = scores_of(workload)
    report(demo, MODEL, workload, answers_with(workload, scores), scores)
    assert demo.failures == []
    assert finish(demo, None) == 0
    assert "demo passed" in capsys.readouterr().out


def test_the_last_line_works_where_the_environment_is_not_active(demo, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", str(demo.out / ".venv/bin/python"))
    monkeypatch.chdir(demo.out)
    assert finish(demo, None) == 0
    assert "serve it yourself: .venv/bin/hstu-trt serve" in capsys.readouterr().out


@pytest.mark.parametrize("error", [1e-3, np.nan])
def test_scores_that_differ_fail_and_are_named(demo, workload, capsys, error):
    scores = scores_of(workload)
    report(demo, MODEL, workload, answers_with(workload, scores, error), scores)
    assert finish(demo, None) == 1
    assert "FAILED: ranking_fused: " in capsys.readouterr().out
    assert json.loads((demo.folder / "demo.json").read_text())["passed"] is False


def test_ranking_is_by_score_and_shows_each_candidate_once(workload):
    scores = scores_of(workload)
    lines = whole_road.ranking(MODEL, workload, answers_with(workload, scores), scores).splitlines()[2:]
    ids, shown = [line.split()[1] for line in lines], [float(line.split()[3]) for line in lines]
    assert len(set(ids)) == len(ids) <= whole_road.SHOWN_CANDIDATES
    assert shown == sorted(shown, reverse=True)


def test_latency_figures():
    answers = Answers(clients=3, scores=[np.zeros(1)] * 101, latency_ms=np.arange(101.0), seconds=2.0)
    assert answers.figures() == (101, 3, 50.0, 90.0, 99.0, 50.5)


@pytest.mark.parametrize(("code", "failures"), [(0, 0), (1, 1)])
def test_a_failed_gate_is_noted(demo, monkeypatch, code, failures):
    monkeypatch.setattr(cli, "main", lambda words: code)
    demo.verb("bench", "accuracy")
    assert len(demo.failures) == failures


def test_a_failed_verb_ends_the_demo(demo, monkeypatch):
    monkeypatch.setattr(cli, "main", lambda words: 2)
    with pytest.raises(HstuTrtError, match="hstu-trt export ended with code 2"):
        demo.verb("export")


def test_a_verbs_output_can_go_to_a_file(demo, monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", lambda words: print("planted") or 0)
    demo.verb("bench", "accuracy", printed_to=demo.folder / "accuracy.txt")
    assert (demo.folder / "accuracy.txt").read_text() == "planted\n"
    assert capsys.readouterr().out == "$ hstu-trt bench accuracy\n"


def test_the_accuracy_summary_counts_gates(tmp_path):
    tensor = {"variant": "v", "tensor": "preds", "max_abs": 0.5, "tolerance": 0.1, "passed": False}
    metrics = [{"gate": None, "passed": True}, {"gate": 1.0, "passed": True}]
    facts = {"reference": "r", "tensors": [tensor], "metrics": metrics}
    (tmp_path / "accuracy.json").write_text(json.dumps(facts))
    text = accuracy_summary(tmp_path)
    assert "1 of 2 gates kept" in text
    assert "BEYOND" in text
