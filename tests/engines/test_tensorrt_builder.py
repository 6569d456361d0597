"""Builder ``tensorrt`` on a stand-in of its module: what is parsed, checked, configured, kept and refused.

The stand-in's parser follows the measured rule for plugins and functions. That TensorRT itself accepts all this only a
machine that has it can show.
"""

import dataclasses
import json
import sys

import pytest
from fake_driver import H100, L40S

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import file_sha256, read_manifest
from hstu_trt.contract.ops import OPS
from hstu_trt.engines import tensorrt_builder
from hstu_trt.engines.modules import TENSORRT, open_module, version_numbers


def test_every_op_becomes_a_plugin(build_golden, module, library, tmp_path, capsys):
    assert build_golden() == 0
    manifest = read_manifest(tmp_path / "e", kind="engines", regenerate="")
    stages = {stage["stage"]: stage["details"] for stage in manifest["stages"]}
    counts = {name: (details["plugin_layers"], details["op_nodes"]) for name, details in stages.items()}
    assert counts == {"embedding_lookup": (5, 5), "hstu": (3, 3), "mlp_head": (0, 0), "ranking_fused": (8, 8)}
    assert manifest["plugins"] == {"file": "libhstu_trt_plugins.so", "sha256": file_sha256(library.plugin_library())}
    facts = {name: manifest[name] for name in ("gpu", "driver", "compute_capabilities", "target", "builder")}
    assert facts == {
        "gpu": H100.name,
        "driver": H100.driver,
        "compute_capabilities": [90],
        "target": "h100",
        "builder": "tensorrt",
    }
    assert [profile["name"] for profile in stages["hstu"]["profiles"]] == ["single", "batch"]
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"manifest.json", *(f"{s}.plan" for s in stages)}
    assert "3 of 3" in capsys.readouterr().out
    assert all(config.flags == set() for config in module.configs)


def test_a_library_without_a_creator_is_an_error(build_golden, library, tmp_path, capsys):
    """Functions are stripped, so nothing takes the place of a missing plugin."""
    lacking = {(op.name, op.version, op.domain) for op in OPS.values() if op.name != "HstuAttention"}
    library.load_plugins = lambda registry: registry.creators.update(lacking)
    assert build_golden() == 2
    assert "Plugin not found" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_body_in_place_of_a_plugin_is_an_error(build_golden, monkeypatch, library, capsys):
    """Should functions ever stay in: the count of plugin layers tells."""
    library.load_plugins = lambda registry: None
    prepare = tensorrt_builder.prepare

    def keep_functions(graph, path, *, plugins):
        return dataclasses.replace(prepare(graph, path, plugins=plugins), model=graph)

    monkeypatch.setattr(tensorrt_builder, "prepare", keep_functions)
    assert build_golden() == 2
    assert "the network has 0 plugin layers, the graph has 5 nodes that must be plugins" in capsys.readouterr().err


def test_a_baseline_without_plugins(build_golden, module, library, tmp_path):
    library.plugin_library = None
    assert build_golden("--no-plugins") == 0
    manifest = read_manifest(tmp_path / "e", kind="engines", regenerate="")
    assert {stage["details"]["plugin_layers"] for stage in manifest["stages"]} == {0}
    assert "plugins" not in manifest
    assert not module.registry.creators


def test_options_reach_the_config(build_golden, module):
    options = ["--refit", "--strip-plan", "--version-compatible", "--tf32", "--opt-level", "5", "--workspace-mib", "64"]
    assert build_golden(*options, "--hardware-compat", "ampere_plus", "--stages", "mlp_head", target="a100") == 2
    assert not module.configs, "an A100's default builder is tensorrt_rtx"
    more = ["--hardware-compat", "ampere_plus", "--stages", "mlp_head", "--builder", "tensorrt"]
    assert build_golden(*options, *more, target="a100") == 0
    (config,) = module.configs
    assert config.flags == {"TF32", "REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE"}
    assert (config.builder_optimization_level, config.pools) == (5, {"WORKSPACE": 64 << 20})
    assert config.hardware_compatibility_level.name == "AMPERE_PLUS"
    assert len(config.profiles) == 2


@pytest.mark.parametrize(
    ("device", "more", "target", "message"),
    [
        (
            L40S,
            [],
            "h100",
            "the GPU here is NVIDIA L40S (compute capability 8.9), h100 has 9.0: TensorRT builds on the",
        ),
        (L40S, ["--builder", "tensorrt"], "l4", "the GPU here is NVIDIA L40S (compute capability 8.9), not L4"),
        (L40S, ["--builder", "tensorrt", "--also", "l4"], "l40s", "--also is for builder tensorrt_rtx"),
        (
            dataclasses.replace(H100, name="Tesla T4", compute_capability=75),
            ["--hardware-compat", "ampere_plus"],
            "h100",
            "ampere_plus needs compute capability 8.0 or later",
        ),
    ],
)
def test_the_wrong_gpu_is_refused(build_golden, gpu, capsys, device, more, target, message):
    gpu(device)
    assert build_golden(*more, target=target) == 2
    assert message in capsys.readouterr().err


def test_compatible_engines_build_on_another_gpu(build_golden, gpu):
    gpu(L40S)
    head = ["--stages", "mlp_head", "--hardware-compat"]
    assert build_golden(*head, "same_cc", "--builder", "tensorrt", target="l4") == 0
    assert build_golden(*head, "ampere_plus", target="h100") == 0


@pytest.mark.parametrize(
    ("version", "accepted"),
    [("10.15.1.29", True), ("10.16.1.11", True), ("11.4.0.106", True), ("10.14.1.48", False), ("12.0.0", False)],
)
def test_versions(build_golden, module, capsys, version, accepted):
    module.__version__ = version
    assert build_golden("--stages", "mlp_head") == (0 if accepted else 2)
    said = f"TensorRT {version} is installed; this needs 10.15 or later, up to 11.x: pip install 'tensorrt>=10.15,<12'"
    assert (said in capsys.readouterr().err) != accepted


def test_a_missing_module_names_the_package(build_golden, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build_golden() == 2
    error = capsys.readouterr().err
    assert "the Python module 'tensorrt' cannot be imported" in error
    assert error.rstrip().endswith("install TensorRT: pip install tensorrt")


def test_a_missing_library_names_the_target(build_golden, library, capsys):
    def missing():
        raise ArtefactError("libhstu_trt_plugins.so is not there: make plugins")

    library.plugin_library = missing
    assert build_golden() == 2
    assert "make plugins" in capsys.readouterr().err


def test_a_stale_model_is_refused(build_golden, golden_folder, tmp_path, capsys):
    copy = tmp_path / "model"
    for path in golden_folder.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(golden_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    document = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**document, "contract": "0" * 64}))
    assert build_golden("--model", str(copy)) == 2
    assert "was exported under another contract; make it again with: hstu-trt export" in capsys.readouterr().err
    assert build_golden("--precision", "fp8", "--gpu", "a100") == 2
    assert (
        "a100 has no precision 'fp8': compute capability 8.0 has no fp8, 8.9 and later have" in capsys.readouterr().err
    )


def test_dry_run_prints_the_lines_on_any_machine(build_golden, gpu, module, tmp_path, capsys):
    gpu(L40S)
    assert build_golden("--dry-run", "--stages", "hstu") == 0
    printed = capsys.readouterr()
    trtexec, polygraphy = (
        next(line for line in printed.out.splitlines() if line.startswith(tool)) for tool in ("trtexec", "polygraphy")
    )
    assert "--dynamicPlugins=build/lib/libhstu_trt_plugins.so" in trtexec
    assert "--plugins build/lib/libhstu_trt_plugins_autoload.so" in polygraphy
    assert "cannot be built on this machine: the GPU here is NVIDIA L40S" in printed.err
    assert not module.configs
    assert not (tmp_path / "e").exists()


def test_dry_run_needs_no_tensorrt(build_golden, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert build_golden("--dry-run", "--stages", "hstu") == 0
    printed = capsys.readouterr()
    assert "trtexec --onnx=" in printed.out
    assert "cannot be built on this machine: the Python module 'tensorrt' cannot be imported" in printed.err
    assert build_golden("--dry-run", "--also", "l4") == 2
    assert "--also is for builder tensorrt_rtx" in capsys.readouterr().err


def test_version_numbers():
    assert version_numbers("11.4.0.106") == (11, 4, 0, 106)
    assert version_numbers("10.15.1.post1") == (10, 15, 1)
    assert version_numbers("x") == (0,)


def test_the_version_is_read_from_the_module(module):
    assert open_module(TENSORRT).version == "11.4.0.106"
