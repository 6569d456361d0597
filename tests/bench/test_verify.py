"""``verify-tensorrt`` without a GPU: its steps, what it misses here, and the rows and table that it writes."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hstu_trt.bench.verify import steps as verify_steps
from hstu_trt.bench.verify import verb as verify
from hstu_trt.bench.verify.steps import Gpu, Step, command_text, count_tests, diff_figure, engine_counts, steps
from hstu_trt.bench.verify.support_rows import StepResult, SupportRow, append_row, markdown, read_support
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.plugin_files import PLUGINS_VARIABLE
from hstu_trt.plugins.build import RECORD

H100 = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", driver="580.1")


@pytest.mark.parametrize(
    ("device", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtxpro6000"),
        ("NVIDIA GeForce RTX 3060", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_the_target_of_a_gpu(device, target):
    gpu = Gpu(name=device, compute_capability="8.9", driver="1")
    if target is None:
        with pytest.raises(ConfigError, match="none of the GPUs"):
            _ = gpu.target
    else:
        assert gpu.target == target


def test_kernels_for_the_gpu():
    assert H100.arch == "90a"
    assert Gpu(name="x", compute_capability="8.6", driver="1").arch == "80"
    assert Gpu(name="x", compute_capability="13.0", driver="1").arch == "all"


def test_steps_name_their_needs_in_order(tmp_path):
    plan = steps(H100, "h100", ["fp16", "fp8"], tmp_path)
    assert [step.name for step in plan] == [
        *("plugins", "headers", "export fp32", "export fp16", "export fp8", "engines fp16", "engines fp8"),
        *("tests", "diff fp16", "diff fp8"),
    ]
    for number, step in enumerate(plan):
        assert set(step.needs) <= {earlier.name for earlier in plan[:number]}


def test_the_tests_build_for_the_same_target(tmp_path):
    plan = {step.name: step.command for step in steps(H100, "h200", ["fp16"], tmp_path)}
    assert "--gpu-target=h200" in plan["tests"]
    assert "h200" in plan["engines fp16"]


@pytest.mark.parametrize(("words", "wanted"), [((), ["fp16", "fp8"]), (("--precisions", "fp16"), ["fp16"])])
def test_precisions_are_those_of_the_gpu(capsys, words, wanted):
    assert verify_steps.engine_precisions("a100") == ["fp16"]
    assert main(["bench", "verify-tensorrt", "--dry-run", "--gpu", "l4", *words]) == 0
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines() if line.startswith("diff")] == [
        f"diff {precision}" for precision in wanted
    ]


def test_commands_are_shown_as_a_user_types_them(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", str(verify_steps.ROOT / ".venv" / "bin" / "python"))
    plan = {step.name: step for step in steps(None, "h100", ["fp16"], tmp_path)}
    assert command_text(plan["plugins"]) == "make plugins ARCHS=all"
    assert command_text(plan["engines fp16"]).startswith("hstu-trt engines --model ")
    assert command_text(plan["tests"]).startswith("python -m pytest -m 'gpu or tensorrt'")
    from hstu_trt.bench.diff.runners import parser

    assert parser().parse_args(list(plan["diff fp16"].command[4:])).b == "tensorrt"


def test_a_dry_run_prints_steps_and_what_is_missing(capsys):
    assert main(["bench", "verify-tensorrt", "--dry-run", "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "engines fp16: hstu-trt engines" in shown and "--gpu h100" in shown
    assert "missing here" in shown


def test_a_machine_without_tensorrt_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(verify, "find_gpu", lambda: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "verify-tensorrt"]) == 2
    said = capsys.readouterr().err
    assert "no CUDA GPU" in said and "no TensorRT" in said and "docker/Dockerfile" in said


@pytest.mark.parametrize(("headers", "missing"), [("10.14.1", 1), ("11.4.0", 0), ("", 0)])
def test_plugins_for_another_tensorrt_are_told_at_once(monkeypatch, tmp_path, headers, missing):
    """Unless they are not there yet: the first step makes them, and the second looks."""
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.106", __spec__=object()))
    monkeypatch.setattr(verify, "_sees_cuda", lambda: True)
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path / "p.so"))
    if headers:
        (tmp_path / "p.so").touch()
        (tmp_path / RECORD.name).write_text(json.dumps({"tensorrt_headers": headers}))
    found = verify.missing_parts(H100)
    assert len(found) == missing and all("TENSORRT_ROOT" in part for part in found)


def plan_of(tmp_path: Path) -> list[Step]:
    stale = tmp_path / "stale.json"
    stale.write_text("{}")
    return [
        Step(name="plugins", command=("make",)),
        Step(name="engines", command=("build",), needs=("plugins",), figure=lambda: "5 engines"),
        Step(name="tests", command=("test",), needs=("plugins",), figure=stale.read_text, result=stale),
        Step(name="diff", command=("diff",), needs=("engines",)),
    ]


def test_a_failure_skips_what_needs_it(tmp_path):
    results = verify.run_steps(plan_of(tmp_path), tmp_path, lambda command, log: command[0] == "build")
    assert [(r.name, r.status) for r in results] == [
        ("plugins", "passed"),
        ("engines", "failed"),
        ("tests", "passed"),
        ("diff", "skipped"),
    ]
    assert [r.figure for r in results] == ["", "5 engines", "left no figure: FileNotFoundError", "after engines"]


def test_a_command_leaves_its_log(tmp_path, capsys):
    assert verify.run_command(["bash", "-c", "echo planted; exit 3"], tmp_path / "log") == 3
    assert (tmp_path / "log").read_text() == "planted\n" and "planted" in capsys.readouterr().err


def test_figures(tmp_path):
    junit = tmp_path / "tests.xml"
    junit.write_text('<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>')
    assert count_tests(junit) == "5 passed, 2 failed, 2 skipped"
    stages = [{"details": {"plugin_layers": 3}}, {"details": {"plugin_layers": 1}}, {}]
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": stages}))
    assert engine_counts(tmp_path) == "3 engines, 4 plugin layers"
    outputs = [{"name": "preds", "max_abs": 3.3e-4, "tolerance": 4e-3}, {"name": "user_embeddings"}]
    (tmp_path / "diff.json").write_text(json.dumps({"outputs": outputs}))
    assert diff_figure(tmp_path / "diff.json") == "scores within 3.3e-04 of 0.004"


def row(date: str = "2026-11-22T10:00:00Z", status: str = "passed", device: str = "NVIDIA L4") -> SupportRow:
    return SupportRow(
        device=device,
        date=date,
        commit="abc",
        versions={"tensorrt": "11.4.0.106", "driver": "580.1"},
        compute_capability="8.9",
        steps=(StepResult(name="plugins", status="passed"), StepResult(name="diff", status=status, figure="a|b")),
    )


def test_rows_go_out_and_come_back(tmp_path):
    path = tmp_path / "deep" / "support.jsonl"
    assert read_support(path) == []
    for one in (row(), row(status="failed")):
        append_row(path, one)
    assert read_support(path) == [row(), row(status="failed")]
    path.write_text('{"suite": "support"}\n')
    with pytest.raises(ArtefactError, match=r"support.jsonl:1 is no row"):
        read_support(path)


def test_the_table_shows_the_newest_row_of_each_gpu():
    table = markdown([row("2026-11-23T10:00:00Z", "failed"), row(), row(device="NVIDIA H100")]).splitlines()
    assert len(table) == 4
    assert "**failed** (a/b)" in table[2] + table[3] and all(line.count("|") == table[0].count("|") for line in table)
    assert "make verify-tensorrt" in markdown([])
    assert row().passed and not row(status="skipped").passed


def test_the_table_verb(tmp_path, capsys):
    append_row(tmp_path / "rows.jsonl", row())
    assert main(["bench", "table-support", "--rows", str(tmp_path / "rows.jsonl")]) == 0
    assert "| NVIDIA L4 (8.9) | 11.4.0.106 | 580.1 | 2026-11-22, `abc` | yes | yes (a/b) |" in capsys.readouterr().out
