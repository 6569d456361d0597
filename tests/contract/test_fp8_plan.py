"""The parts of a model that can be in fp8, and plans on disk."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.fp8_plan import ALL, LAYERS, Fp8Plan, fp8_sites, layer_sites, planned_sites
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.numerics import FP8_BEYOND_LAYERS
from hstu_trt.contract.presets import debug, dlrm_v3
from hstu_trt.contract.tensors import default_limits


def test_the_parts_follow_the_config() -> None:
    sites = fp8_sites(dlrm_v3())
    assert len(sites) == 3 + 3 * 5 + 3 and len(set(sites)) == len(sites)
    assert sites[:4] == ("preprocessor.content", "preprocessor.additional", "preprocessor.action", "stu.0.uvqk")
    bare = dataclasses.replace(
        debug(), layers=1, action_weights=None, postprocessor="l2_norm", feature_pairs=debug().feature_pairs[:1]
    )
    layers = ("stu.0.uvqk", "stu.0.attention", "stu.0.output")
    assert fp8_sites(bare) == ("preprocessor.content", *layers, "item_tower", "head")
    assert layer_sites(bare) == layers


def test_a_plan_survives_the_disk_in_the_models_order(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Fp8Plan(model="m", fp8=("head", "stu.1.output", "preprocessor.content")).save(path, "hstu-trt ...")
    assert planned_sites(str(path), debug()) == ("preprocessor.content", "stu.1.output", "head")


def test_named_plans_need_no_file() -> None:
    assert planned_sites(ALL, debug()) == fp8_sites(debug())
    assert planned_sites(LAYERS, debug()) == layer_sites(debug())


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        (None, ArtefactError, "no precision plan at"),
        ("{", ArtefactError, "not readable JSON"),
        ("[]", ArtefactError, "no precision plan of schema 1"),
        ({"kind": "onnx"}, ArtefactError, "no precision plan of schema 1"),
        ({"fp8": "head"}, ArtefactError, "'fp8' is no list of names"),
        ({"fp8": ["stu.2.uvqk"]}, ConfigError, "the model has no part 'stu.2.uvqk'; its parts are preprocessor"),
    ],
)
def test_a_wrong_plan_is_said_in_words(text: object, error: type[Exception], match: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if isinstance(text, dict):
        text = json.dumps({"schema": 1, "kind": "fp8-plan", "fp8": [], **text})
    if text is not None:
        path.write_text(str(text))
    with pytest.raises(error, match=match):
        planned_sites(str(path), debug())


@pytest.mark.parametrize(
    ("precision", "sites", "row"),
    [
        ("fp16", (), "fp16"),
        ("fp8", ("stu.0.uvqk",), "fp8"),
        ("fp8", ("stu.0.uvqk", "head"), FP8_BEYOND_LAYERS),
    ],
)
def test_the_tolerances_of_a_model_follow_its_parts(precision: str, sites: tuple[str, ...], row: str) -> None:
    model = ModelFolder(
        path=Path("m"), name="m", config=debug(), limits=default_limits(debug()), precision=precision,
        fp8_sites=sites, digest="",
    )  # fmt: skip
    assert model.tolerances == row
