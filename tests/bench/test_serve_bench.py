"""A real tritonserver under a short load: rows, statistics, checks, the plan's queue and the page from them."""

import json

import pytest

from hstu_trt.bench.report.verb import page
from hstu_trt.bench.result_rows import read_rows
from hstu_trt.bench.serving import serve
from hstu_trt.contract.cli import main as cli
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.assemble import Options, assemble


@pytest.fixture(scope="module")
def deployment(exported, tmp_path_factory):
    out = tmp_path_factory.mktemp("load") / "ckptA"
    assemble(read_model_folder(exported("fp32")), out, Options())
    return out


SHORT = ["--seconds", "0.4", "--probe-seconds", "0.2", "--repeats", "2", "--single-requests", "30", "--requests", "32"]


@pytest.mark.triton
def test_a_served_model_under_load(deployment, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    options = ["--scenarios", "single,offline,server,open", "--rates", "20,40", "--guess", "60"]
    argv = ["--deployment", str(deployment), *SHORT, *options, "--slo-ms", "10000", "--out", str(out)]
    assert serve.main([*argv, "--served", "ranking_fused", "--commit", "abc"]) == 0
    rows = read_rows([out])
    scenarios = [row.details["scenario"] for row in rows]
    assert scenarios == ["single", "offline", "server", "open", "open"]
    for row in rows:
        assert row.checks["gates_failed"] == 0 and row.checks["requests"] == 32 and row.commit == "abc"
        assert row.details["run"]["errors"] == {} and row.details["machine"]["gpu"] is None
        step = row.details["steps"]["ranking_fused"]
        assert step["source"] == "hstu_trt", "Triton's end where the model takes requests in"
        assert step["executions"] > 0 and step["failures"] == 0 and step["ms"]["compute_infer"] > 0
    sent = 2 * 30  # of both runs, without the warm-up
    assert rows[0].details["steps"]["ranking_fused"]["inferences"] == pytest.approx(sent, abs=1)
    assert rows[2].details["found"]["kept"] and rows[2].details["found"]["probes"]
    assert "ranking_fused offline" in capsys.readouterr().out
    assert "Latency over throughput" in page(rows)
    assert cli(["bench", "plan", "--rate", "1000", "--rows", str(out), "--slo-ms", "10000"]) == 0
    assert "measured: ranking_fused server" in capsys.readouterr().out


def test_a_dry_run_starts_nothing(deployment, capsys):
    assert serve.main(["--deployment", str(deployment), "--requests", "8", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "p99 <= 80 ms" in said and "ranking, ranking_fused" in said


def test_unknown_scenarios_are_refused(deployment, capsys):
    assert cli(["bench", "serve", "--deployment", str(deployment), "--scenarios", "online"]) == 2
    assert "unknown scenarios online" in capsys.readouterr().err


def test_an_engine_in_this_process(exported, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    argv = ["bench", "in-process", "--model", str(exported("fp32")), *SHORT, "--scenarios", "single,offline", "--json"]
    assert cli([*argv, "--out", str(out)]) == 0
    documents = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in documents] == ["onnxruntime single", "onnxruntime offline 8 in flight"]
    assert documents[0]["checks"]["gates_failed"] == 0 and documents[0]["details"]["steps"] == {}
