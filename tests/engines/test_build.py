"""``hstu-trt engines``: the onnxruntime builder, from a stand-in model folder to an engines folder."""

import json

import pytest

from hstu_trt.contract.cli import main as command_line
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_manifest
from hstu_trt.engines import onnx_runtime_builder
from hstu_trt.engines.build import build, make_plan, stages_up_to_date
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner

STAGES = ["embedding_lookup", "hstu", "mlp_head", "ranking_fused", "hstu_taps"]


def plan_for(model, out):
    return make_plan(model.path, "cpu", "fp32", out)


def engines(model, out, *more):
    return command_line(
        ["engines", "--model", str(model.path), "--gpu", "cpu", "--precision", "fp32", "--out", str(out), *more]
    )


def contents(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_engines_are_the_models_own_files(model, tmp_path):
    """No copy of the tables, and no link: ONNX's checker refuses external data with a second link."""
    before = contents(model.path)
    out = tmp_path / "engines"
    stages = build(plan_for(model, out))
    assert [(stage.stage, stage.file) for stage in stages] == [(name, str(model.onnx(name))) for name in STAGES]
    assert contents(out) == {"manifest.json"}
    assert contents(model.path) == before
    assert all(path.stat().st_nlink == 1 for path in model.path.rglob("*") if path.is_file())
    manifest = read_manifest(out, kind="engines", regenerate="")
    assert (manifest["target"], manifest["builder"], manifest["precision"]) == ("cpu", "onnxruntime", "fp32")
    assert manifest["model"] == {"name": model.name, "folder": str(model.path), "digest": model.digest}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_is_built_twice(model, tmp_path, capsys):
    out = tmp_path / "engines"
    assert engines(model, out) == 0
    assert ": built" in capsys.readouterr().out
    before = (out / "manifest.json").stat()
    assert engines(model, out) == 0
    assert "up to date" in capsys.readouterr().out
    assert (out / "manifest.json").stat().st_ino == before.st_ino
    assert engines(model, out, "--force") == 0
    assert (out / "manifest.json").stat().st_ino != before.st_ino


def test_a_damaged_manifest_is_built_again(model, tmp_path):
    out = tmp_path / "engines"
    build(plan_for(model, out))
    document = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**document, "stages": [{"stage": 1}]}))
    assert stages_up_to_date(plan_for(model, out)) is None
    build(plan_for(model, out))
    assert stages_up_to_date(plan_for(model, out)) is not None


def test_another_model_or_version_is_built_again(model, write_model, graphs, tmp_path, monkeypatch):
    out = tmp_path / "engines"
    build(plan_for(model, out))
    other = write_model({"mlp_head": graphs["mlp_head"].replace("Add (a, b)", "Sub (a, b)")})
    assert stages_up_to_date(plan_for(other, out)) is None
    monkeypatch.setattr(onnx_runtime_builder.onnxruntime, "__version__", "0")
    assert stages_up_to_date(plan_for(model, out)) is None


def test_dry_run_writes_nothing(model, tmp_path, capsys):
    out = tmp_path / "engines"
    assert engines(model, out, "--dry-run") == 0
    assert "to be built" in capsys.readouterr().out
    assert not out.exists()


def test_json_names_state_and_stages(model, tmp_path, capsys):
    assert engines(model, tmp_path / "engines", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["state"] == "built"
    assert [stage["stage"] for stage in document["stages"]] == STAGES


@pytest.mark.parametrize(
    ("option", "text", "least"),
    [("--workspace-mib", "0", 1), ("--workspace-mib", "x", 1), ("--max-table-mib", "-5", 0)],
)
def test_sizes_in_options_are_whole_numbers(capsys, option, text, least):
    with pytest.raises(SystemExit) as stopped:
        command_line(["engines", option, text])
    assert stopped.value.code == 2
    assert f"argument {option}: must be a whole number >= {least}, got {text!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "precision", "message"),
    [
        ("v100", "fp32", "no target 'v100': choose from cpu, t4"),
        ("cpu", "fp8", r"was exported in fp32, not fp8; for fp8: hstu-trt export .* --precision fp8"),
        ("cpu", "fp16", r"was exported in fp32, not fp16; for fp16: hstu-trt export .* --precision fp16"),
    ],
)
def test_wrong_targets_and_precisions_are_refused(model, tmp_path, gpu, precision, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(model.path, gpu, precision, tmp_path / "engines")


@pytest.mark.parametrize("file", ["hstu.onnx", "tables/item_id/00000.safetensors"])
def test_a_damaged_model_is_refused(model, tmp_path, file):
    with (model.path / file).open("ab") as stream:
        stream.write(b"?")
    with pytest.raises(ArtefactError, match=file):
        plan_for(model, tmp_path / "engines")


def test_a_stage_that_does_not_load_leaves_the_old_folder(model, write_model, graphs, tmp_path, capsys):
    out = tmp_path / "engines"
    build(plan_for(model, out))
    broken = write_model({"mlp_head": graphs["mlp_head"].replace("preds", "scores")})
    assert engines(broken, out) == 2
    assert "its outputs are scores" in capsys.readouterr().err
    assert stages_up_to_date(plan_for(model, out)) is not None


def test_a_missing_stage_is_refused(model, tmp_path):
    plan = plan_for(model, tmp_path / "engines")
    model.onnx("hstu_taps").unlink()
    with pytest.raises(ArtefactError, match=r"hstu_taps.onnx is missing"):
        build(plan)
    assert not plan.out.exists()


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_with_other_things_is_never_replaced(model, tmp_path, force, capsys):
    keep = tmp_path / "mine"
    keep.mkdir()
    (keep / "thesis.txt").write_text("years")
    assert engines(model, keep, *force) == 2
    assert engines(model, model.path, *force) == 2
    assert capsys.readouterr().err.count("holds something else than engines") == 2
    assert (keep / "thesis.txt").read_text() == "years"
    OnnxRuntimeRunner(model, "hstu")
