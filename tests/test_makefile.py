"""What ``make -n`` would run for a model: the lines, in a folder where nothing was built."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = "--table-rows item_id=100000 --table-rows user_id=1000"


@pytest.fixture
def make(tmp_path):
    """``make("onnx", "MODEL=demo")``: the exit code, and the lines of ``tool`` or, on failure, those of stderr."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("pyproject.toml", "constraints.txt", ".venv/installed"):  # in this order: nothing is to be installed
        (tmp_path / name).touch()

    def run(*words: str, tool: str = ".venv/bin/hstu-trt") -> tuple[int, list[str]]:
        command = ["make", "-n", *words]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        shown = result.stderr if result.returncode else result.stdout.replace("\\\n", " ")
        lines = [" ".join(line.split()) for line in shown.splitlines()]
        own = [line.removeprefix(".venv/bin/") for line in lines if line.startswith(tool)]
        return result.returncode, lines if result.returncode else own

    return run


EXPORT = "hstu-trt export --config {config} --weights {weights}"
FP32 = f"{EXPORT} --precision fp32 --name {{model}} --out build/onnx/{{model}}/fp32"
DEMO = {"config": "tests/golden/caseA/config.json", "weights": "tests/golden/ckptA", "model": "demo"}


def test_the_full_size_model_in_fp8_as_engines(make):
    code, lines = make("engines", "GPU=h100", "PRECISION=fp8", "MODEL=dlrm_v3")
    assert (code, lines) == (
        0,
        [
            FP32.format(config="dlrm_v3", weights=f"random:1 {ROWS}", model="dlrm_v3"),
            "hstu-trt export --weights build/onnx/dlrm_v3/fp32 --precision fp8 --out build/onnx/dlrm_v3/fp8",
            "hstu-trt engines --model build/onnx/dlrm_v3/fp8 --gpu h100 --precision fp8"
            " --out build/engines/h100/dlrm_v3/fp8",
        ],
    )


def test_a_trained_model_in_fp8_is_planned(make):
    code, lines = make("onnx", "PRECISION=fp8")
    assert code == 0 and lines[0] == FP32.format(**DEMO)
    assert [line.split(" --")[0] for line in lines[1:]] == ["hstu-trt bench plan-precision", "hstu-trt export"]
    assert "--plan build/plans/demo/plan.json --calibration build/plans/demo/calibration.safetensors" in lines[-1]


@pytest.mark.parametrize(
    ("is_sound", "words", "exports"),
    [(True, (), 1), (False, (), 2), (True, ("CONFIG=c.json", "WEIGHTS=w"), 2)],
)
def test_fp8_starts_from_the_checkpoint_that_is_given(make, tmp_path, is_sound, words, exports):
    """The fp32 model at hand serves only where no other checkpoint is named, and where it can still be read."""
    there = tmp_path / "build/onnx/demo/fp32/manifest.json"
    there.parent.mkdir(parents=True)
    there.touch()
    check = tmp_path / ".venv/bin/python"
    check.parent.mkdir()
    check.write_text(f"#!/bin/sh\nexit {0 if is_sound else 1}\n")
    check.chmod(0o755)
    code, lines = make("onnx", "PRECISION=fp8", *words)
    assert code == 0 and sum(line.startswith("hstu-trt export") for line in lines) == exports
    assert not words or lines[0] == FP32.format(config="c.json", weights="w", model="demo")


@pytest.mark.parametrize("target", ["onnx", "engines", "serve"])
@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_a_name_alone_is_no_model(make, target, precision):
    code, said = make(target, "MODEL=mine", f"PRECISION={precision}")
    assert code and any("make onnx MODEL=mine CONFIG=config.json WEIGHTS=checkpoint" in line for line in said)


def test_a_checkpoint_with_random_weights_of_a_config_of_ones_own(make):
    code, lines = make("onnx", "MODEL=mine", "CONFIG=c.json", "WEIGHTS=random:3")
    assert (code, lines) == (0, [FP32.format(config="c.json", weights="random:3", model="mine")])


def test_the_lean_runtimes_are_there_before_the_tests_that_load_them(make):
    code, lines = make("verify-tensorrt", "PRECISIONS=fp16,fp8", "GPU=l4", tool=".venv/bin/")
    assert code == 0 and lines[-1] == "hstu-trt bench verify-tensorrt --precisions fp16,fp8 --gpu l4"
    assert make("verify-tensorrt")[1] == ["hstu-trt bench verify-tensorrt"]
    assert [line.split()[-1] for line in lines[:-1]] == [
        f"tensorrt-lean-cu13-bindings=={version}" for version in ("10.15.1.29", "11.4.0.106")
    ]


@pytest.mark.parametrize(
    ("target", "suite"), [("bench-serve", "serve"), ("perf", "perf"), ("side-by-side", "side-by-side")]
)
def test_load_goes_to_the_model_s_deployment(make, target, suite):
    code, lines = make(target, "MODEL=demo", "LOAD=--seconds 3")
    assert code == 0
    assert lines[-2:] == [
        "hstu-trt assemble --model build/onnx/demo/fp32 --flavour cpu --out build/deployments/demo",
        f"hstu-trt bench {suite} --deployment build/deployments/demo --seconds 3",
    ]


@pytest.mark.parametrize(
    ("words", "deployment", "options"),
    [
        (("SERVED=ranking_fused",), "demo-ranking_fused", "--flavour cpu --served ranking_fused"),
        (
            ("SERVED=ranking", "FLAVOUR=cuda", "PRECISION=fp16"),
            "demo-cuda-fp16-ranking",
            "--flavour cuda --served ranking",
        ),
    ],
)
def test_one_served_model_has_a_deployment_of_its_own(make, words, deployment, options):
    code, lines = make("serve", *words)
    precision = "fp16" if "PRECISION=fp16" in words else "fp32"
    assert code == 0 and lines[-2:] == [
        f"hstu-trt assemble --model build/onnx/demo/{precision} {options} --out build/deployments/{deployment}",
        f"hstu-trt serve --deployment build/deployments/{deployment}",
    ]
