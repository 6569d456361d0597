"""Inputs for Polygraphy's command line: each is a request that the stage accepts, and Polygraphy reads them."""

import subprocess
import sys
from pathlib import Path

import pytest

from hstu_trt.bench.polygraphy_feeds import FED_STAGES, feeds, shape_options, stage_spec
from hstu_trt.bench.workloads.requests_source import generate_requests
from hstu_trt.contract.cli import main
from hstu_trt.contract.features import check_request
from hstu_trt.contract.model_folder import read_model_folder


@pytest.mark.parametrize("stage", FED_STAGES)
def test_feeds_are_requests(exported, stage: str) -> None:
    model = read_model_folder(exported("fp32"), verify=False)
    requests = generate_requests(model, profile="ci", count=20, seed=3)
    made = list(feeds(model, stage, requests, 128.0))
    assert len(made) > 1
    for feed in made:
        check_request(feed, stage_spec(model, stage), model.limits)


def test_shapes_are_the_contracts(exported) -> None:
    model = read_model_folder(exported("fp32"), verify=False)
    lines = shape_options(model.specs["mlp_head"]).splitlines()
    width = model.ranking_config.model_dim
    assert lines[0].startswith(f"--trt-min-shapes user_embeddings:[1,{width}] candidate_embeddings:[1,")
    assert lines[2].startswith(f"--trt-max-shapes user_embeddings:[{model.limits.batch_candidates},{width}]")


def test_polygraphy_runs_on_them(exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = exported("fp32")
    assert main(["bench", "polygraphy", "--model", str(model), "--requests", "10", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith(f"polygraphy run {model}/ranking_fused.onnx --onnxrt")
    command = [str(Path(sys.executable).with_name("polygraphy")), *said[-2].split()[1:]]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and (tmp_path / "outputs.json").is_file(), result.stdout + result.stderr
