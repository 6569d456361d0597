"""TensorRT-RTX engines, really built, without a GPU. They are not run: no GPU that RTX runs on is at hand."""

import dataclasses
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from fp8_graph import WIDTH, fp8_graph

from hstu_trt.contract.cli import main as command_line
from hstu_trt.contract.errors import ConfigError, HstuTrtError
from hstu_trt.contract.manifest import read_manifest
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.presets import dlrm_v3
from hstu_trt.engines.attention_memory import dense_bytes
from hstu_trt.engines.build import build, make_plan
from hstu_trt.engines.builders import BuildOptions
from hstu_trt.engines.engine_build import EngineJob, build_engine
from hstu_trt.engines.graphs import prepare
from hstu_trt.engines.modules import TENSORRT_RTX, open_module
from hstu_trt.engines.profiles import Profile
from hstu_trt.export import export_model
from hstu_trt.plugins.library import load_library

if os.environ.get("CI") != "true":
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13")

STAGES = ["embedding_lookup", "hstu", "mlp_head", "ranking_fused"]
EVERY_GPU = ["--gpu", "l40s", "--also", "a10,a100,rtxpro6000"]


@pytest.fixture(scope="module")
def rtx():
    return open_module(TENSORRT_RTX)


def engines(model, out, *more, gpu=("--gpu", "l40s")):
    words = ["engines", "--model", model, *gpu, "--precision", json_of(model)["precision"], "--out", out]
    words += ["--cache", Path(out).parent / "cache", *more]
    return command_line([str(word) for word in words])


def json_of(folder):
    return json.loads((Path(folder) / "manifest.json").read_text())


@pytest.fixture(scope="module")
def built(exported, tmp_path_factory):
    """The golden model's engines in fp16, for compute capability 8.0, 8.6, 8.9 and 12.0 at once."""
    out = tmp_path_factory.mktemp("engines") / "golden"
    assert engines(exported("fp16"), out, "--profile", "single", gpu=EVERY_GPU) == 0
    return out


def test_the_golden_model_builds_in_fp16(built):
    manifest = read_manifest(built, kind="engines", regenerate="")
    assert manifest["compute_capabilities"] == [80, 86, 89, 120]
    assert manifest["versions"]["tensorrt_rtx"] == open_module(TENSORRT_RTX).version
    assert [stage["stage"] for stage in manifest["stages"]] == STAGES
    for stage in manifest["stages"]:
        details = stage["details"]
        assert (built / stage["file"]).stat().st_size == stage["bytes"] > 100_000
        assert details["plugin_layers"] == 0
        assert details["network_layers"] > details["kernels"] > 0
        assert len(details["activation_bytes"]) == 1
    memory = {stage["stage"]: stage["details"]["activation_bytes"][0] for stage in manifest["stages"]}
    assert memory["hstu"] > 10_000_000 > memory["embedding_lookup"]


def test_the_golden_model_builds_in_fp32(exported, tmp_path):
    assert engines(exported("fp32"), tmp_path / "e", "--profile", "single", gpu=EVERY_GPU) == 0
    assert [stage["stage"] for stage in json_of(tmp_path / "e")["stages"]] == STAGES


def test_the_golden_model_builds_in_fp8(exported, tmp_path):
    both = ("--gpu", "l40s", "--also", "rtxpro6000")
    assert engines(exported("fp8"), tmp_path / "e", "--profile", "single", gpu=both) == 0
    assert json_of(tmp_path / "e")["compute_capabilities"] == [89, 120]
    assert engines(exported("fp8"), tmp_path / "old", gpu=("--gpu", "a10")) == 2


@pytest.fixture(scope="module")
def dlrm_v3_engines(tmp_path_factory):
    """``dlrm_v3_engines("fp16", gpus, stages, ...)``: the manifest of engines of dlrm_v3, but for its tables full-size.

    Random weights, 5 layers, limits of 14,335 history events and 2,048 candidates, default profiles. Other stages than
    ``stages`` are not traced: that takes most of the time.
    """
    rows = [f"--table-rows={table.name}=64" for table in dlrm_v3().tables]
    make_stages = export_model._ranking_stages

    def build_them(precision, gpus, wanted, *more):
        def wanted_stages(*arguments):
            dense, stages = make_stages(*arguments)
            return dense, {name: stages[name] for name in wanted}

        folder = tmp_path_factory.mktemp("dlrm_v3")
        source = ["--config", "dlrm_v3", "--weights", "random:1", "--precision", precision, *rows]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export_model, "_ranking_stages", wanted_stages)
            assert command_line(["export", *source, *more, "--out", str(folder / "model")]) == 0
        assert engines(folder / "model", folder / "e", "--stages", ",".join(wanted), gpu=gpus) == 0
        return json_of(folder / "e")

    return build_them


def test_dlrm_v3_builds_in_fp16(dlrm_v3_engines):
    manifest = dlrm_v3_engines("fp16", EVERY_GPU, STAGES)
    assert manifest["compute_capabilities"] == [80, 86, 89, 120]
    stages = {stage["stage"]: stage for stage in manifest["stages"]}
    assert list(stages) == STAGES
    assert stages["hstu"]["bytes"] > 40_000_000
    for name in ("hstu", "ranking_fused"):
        # scores in fp32 and weights in fp16 of one layer, of 16,384 tokens in 4 heads: 6 GiB, and some more
        (memory,) = stages[name]["details"]["activation_bytes"]
        assert 1 < memory / (4 * 16_384**2 * 6) < 1.2
        assert "profile batch is left out" in stages[name]["details"]["notes"][0]
    for name in ("embedding_lookup", "mlp_head"):
        assert [profile["name"] for profile in stages[name]["details"]["profiles"]] == ["single", "batch"]


def test_dlrm_v3_builds_in_fp32(dlrm_v3_engines):
    manifest = dlrm_v3_engines("fp32", EVERY_GPU, ["hstu"])
    assert (manifest["precision"], manifest["compute_capabilities"]) == ("fp32", [80, 86, 89, 120])
    (stage,) = manifest["stages"]
    assert stage["stage"] == "hstu" and stage["bytes"] > 60_000_000


def test_dlrm_v3_builds_in_fp8(dlrm_v3_engines):
    """The stages with parts in fp8, calibrated on two requests, of no event and of 1,024."""
    gpus = ("--gpu", "l40s", "--also", "rtxpro6000")
    manifest = dlrm_v3_engines("fp8", gpus, ["hstu", "ranking_fused"], "--calibration", "synthetic:2")
    assert (manifest["precision"], manifest["compute_capabilities"]) == ("fp8", [89, 120])
    stages = {stage["stage"]: stage for stage in manifest["stages"]}
    assert list(stages) == ["hstu", "ranking_fused"]
    for stage in stages.values():
        assert stage["details"]["op_nodes"] >= dlrm_v3().layers
        assert stage["bytes"] > 30_000_000


def fp8_job(capabilities, tokens=1024):
    one = dict.fromkeys(("query_offsets", "prefix_offsets", "candidate_offsets"), ((2,), (2,), (2,)))
    shapes = {"x": ((1, WIDTH), (tokens, WIDTH), (tokens, WIDTH)), **one, "norm": ((1,), (1,), (1,))}
    return EngineJob(
        title="fp8",
        graph=prepare(fp8_graph(), Path("fp8.onnx"), plugins=False),
        profiles=[Profile(name="p", dims={}, shapes=shapes)],
        options=BuildOptions(),
        capabilities=capabilities,
    )


def test_fp8_builds_for_ada_and_blackwell(rtx):
    engine = build_engine(rtx, fp8_job((89, 120)))
    assert len(engine.plan) > 100_000
    assert engine.kernels > 0


@pytest.mark.parametrize("capability", [80, 86])
def test_fp8_is_refused_by_rtx_for_older_gpus(rtx, capability):
    with pytest.raises(HstuTrtError, match=f"could not build fp8: .*sm{capability}.*fp8_e4m3"):
        build_engine(rtx, fp8_job((capability,)))


def test_activations_grow_with_the_square_of_the_tokens(rtx):
    few, more, most = (build_engine(rtx, fp8_job((89,), tokens)).activation_bytes[0] for tokens in (1024, 2048, 4096))
    assert 3.8 < (most - more) / (more - few) < 4.2


def test_a_workspace_that_is_too_small_is_an_error(rtx):
    options = BuildOptions(workspace_mib=1)
    with pytest.raises(HstuTrtError, match="workspace"):
        build_engine(rtx, dataclasses.replace(fp8_job((89,)), options=options))


def test_nothing_is_built_twice(exported, built, tmp_path, capsys):
    """The same again: nothing is touched. Another folder and other stages: what was built is kept, by its bytes."""
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    assert engines(exported("fp16"), built, "--profile", "single", gpu=EVERY_GPU) == 0
    assert "up to date" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before
    out, cache = tmp_path / "other", ["--cache", built.parent / "cache"]
    options = ["--profile", "single", "--stages", "hstu,hstu_taps", *cache]
    assert engines(exported("fp16"), out, *options, gpu=EVERY_GPU) == 0
    printed = capsys.readouterr().out
    assert [line.split()[4] == "kept" for line in printed.splitlines() if line.startswith("hstu")] == [True, False]
    assert (out / "hstu.engine").read_bytes() == (built / "hstu.engine").read_bytes()
    assert {path.name for path in out.iterdir()} == {"manifest.json", "hstu.engine", "hstu_taps.engine"}


def test_other_options_have_other_keys(exported, tmp_path):
    def keys(*more, gpu="l40s"):
        options = BuildOptions(profiles=("single",), stages=("mlp_head",), **dict(more))
        plan = make_plan(exported("fp16"), gpu, "fp16", tmp_path / "e", options=options, cache=tmp_path / "cache")
        return build(plan, force=True)[0].key

    assert keys() == keys() == keys(("max_table_mib", 1)) == keys(gpu="l4")
    assert len({keys(), keys(("tf32", True)), keys(("also", ("a10",))), keys(gpu="a10")}) == 4


def test_the_polygraphy_line_builds_the_engine(exported, tmp_path, capsys):
    out = tmp_path / "e"
    assert engines(exported("fp16"), out, "--stages", "mlp_head", "--dry-run") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "polygraphy convert" in line)
    setting, *words = shlex.split(line)
    assert setting == "POLYGRAPHY_USE_TENSORRT_RTX=1"
    out.mkdir()
    environment = {**os.environ, **dict([setting.split("=")])}
    polygraphy = Path(os.environ.get("VIRTUAL_ENV", os.sys.prefix)) / "bin/polygraphy"
    result = subprocess.run(
        [os.sys.executable, polygraphy, *words[1:]], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert engines(exported("fp16"), tmp_path / "ours", "--stages", "mlp_head") == 0
    ours, theirs = (tmp_path / "ours/mlp_head.engine").stat().st_size, (out / "mlp_head.engine").stat().st_size
    assert abs(ours - theirs) < 0.05 * ours


def test_large_tables_are_not_baked(exported, tmp_path, capsys):
    small = ["--max-table-mib", "0", "--profile", "single"]
    assert engines(exported("fp16"), tmp_path / "e", *small, "--stages", "mlp_head,embedding_lookup") == 2
    assert "embedding_lookup is not built: without plugins its tables" in capsys.readouterr().err
    plan = make_plan(
        exported("fp16"), "l40s", "fp16", tmp_path / "e", options=BuildOptions(max_table_mib=0, profiles=("single",))
    )
    plans, left_out = plan.builder.plan(plan.request)
    assert [one.stage for one in plans] == ["hstu", "mlp_head"]
    assert [sentence.split()[0] for sentence in left_out] == ["embedding_lookup", "ranking_fused"]


def test_profiles_that_dense_attention_cannot_serve_are_left_out(exported, tmp_path):
    model = read_model_folder(exported("fp16"), verify=False)
    plan = make_plan(model.path, "l4", "fp16", tmp_path / "e")
    huge = dataclasses.replace(model.limits, batch_history=100_000)
    request = dataclasses.replace(plan.request, model=dataclasses.replace(model, limits=huge))
    (hstu,) = (one for one in plan.builder.plan(request)[0] if one.stage == "hstu")
    assert [profile.name for profile in hstu.profiles] == ["single"]
    assert "profile batch is left out: scores of" in hstu.notes[0]
    assert dense_bytes(request.model, hstu.profiles[0]) < 1 << 30
    asked = dataclasses.replace(request, options=BuildOptions(profiles=("batch",)))
    with pytest.raises(
        ConfigError, match=r"profile batch is left out: .* exceed 2\^31 - 1 elements; take smaller bounds"
    ):
        plan.builder.plan(asked)
    alone = dataclasses.replace(huge, history=100_000)
    with pytest.raises(ConfigError, match="export with smaller --max-history"):
        plan.builder.plan(dataclasses.replace(request, model=dataclasses.replace(model, limits=alone)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--refit"], "--refit is for builder tensorrt; TensorRT-RTX builds ahead of time without it"),
        (["--strip-plan"], "--strip-plan is for builder tensorrt"),
        (["--version-compatible"], "--version-compatible is for builder tensorrt"),
        (["--opt-level", "5"], "--opt-level is for builder tensorrt"),
        (["--hardware-compat", "same_cc"], "several GPUs in one engine: --also"),
        (["--also", "h100"], "--also h100: TensorRT-RTX does not build for it"),
        (["--also", "v100"], "no target 'v100'"),
        (["--stages", "hstuu"], "has no stage 'hstuu': choose from embedding_lookup, hstu"),
        (["--builder", "onnxruntime"], "no builder 'onnxruntime' for l40s: choose from tensorrt_rtx, tensorrt"),
    ],
)
def test_wrong_options_are_refused(exported, tmp_path, capsys, more, message):
    assert engines(exported("fp16"), tmp_path / "e", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_the_memory_table(exported, built, capsys, monkeypatch):
    """2,177 tokens: one contextual, 128 of history, 2,048 candidates."""
    command = [exported("fp16"), built, "--profile", "single", "--memory"]
    monkeypatch.setenv("HSTU_TRT_LIB", "/nowhere.so")
    load_library.cache_clear()
    assert engines(*command, gpu=EVERY_GPU) == 0
    assert "make plugins" in capsys.readouterr().out
    monkeypatch.delenv("HSTU_TRT_LIB")
    load_library.cache_clear()
    assert engines(*command, "--json", gpu=EVERY_GPU) == 0
    rows = {row["stage"]: row for row in json.loads(capsys.readouterr().out)["memory"]}
    assert set(rows) == {"hstu", "ranking_fused"}
    assert rows["hstu"]["tokens"] == 1 + 128 + 2048
    assert rows["hstu"]["activation_bytes"] > 10_000_000
    if os.environ.get("CI") == "true":
        assert 0 < rows["hstu"]["plugin_bytes"] < rows["hstu"]["activation_bytes"] / 10
