"""From a checkpoint to a model: what does not fit the config is said in words; tables are found; seeded weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, GoldenCase, load_case
from safetensors.torch import load_file, save_file

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.presets import debug, dlrm_v3
from hstu_trt.export.__main__ import _default_name
from hstu_trt.export.build import check_weights
from hstu_trt.export.checkpoint import TableSource, load_checkpoint
from hstu_trt.export.model import DlrmHstu, cast_to
from hstu_trt.export.weights import load_dense, random_checkpoint, resolve_tables


@pytest.fixture(scope="module")
def case() -> GoldenCase:
    return load_case("caseA")


def test_missing_and_unexpected_keys_are_listed(case: GoldenCase) -> None:
    dense = dict(case.checkpoint.dense)
    dense["_extra.weight"] = dense.pop("_item_embedding_mlp.0.bias")
    with pytest.raises(ArtefactError) as error:
        load_dense(DlrmHstu(case.config), dense, "w.pt")
    text = str(error.value)
    assert "w.pt does not fit the config: 1 keys missing (-), 1 unexpected (+)" in text
    assert "  - _item_embedding_mlp.0.bias\n  + _extra.weight" in text


def test_wrong_shapes_are_listed(case: GoldenCase) -> None:
    dense = {**case.checkpoint.dense, "_item_embedding_mlp.0.bias": torch.zeros(3)}
    with pytest.raises(ArtefactError, match=r"_item_embedding_mlp\.0\.bias: \[3\] in the checkpoint, \[512\] by the"):
        load_dense(DlrmHstu(case.config), dense, "w.pt")


@pytest.mark.parametrize(
    ("config", "name"), [("models/shop.json", "shop"), ("models/shop/config.json", "shop"), ("debug", "debug")]
)
def test_a_model_is_named_after_its_config(config: str, name: str) -> None:
    assert _default_name(config) == name


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qk_dim": 10**7}, ArtefactError, r"_uvqk_weight: \[40, 256\] in the checkpoint, \[40, 40000128\] by the"),
        ({"qk_dim": 10**30}, ConfigError, "the config's widths make tensors that PyTorch cannot hold"),
        ({"heads": 2**62}, ConfigError, "the config's widths make tensors that PyTorch cannot hold"),
        ({"layers": 4}, ArtefactError, r"w\.pt does not fit the config: 7 keys missing \(-\), 0 unexpected"),
    ],
)
def test_weights_are_held_against_the_config_without_memory_for_it(
    case: GoldenCase, change: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_weights(dataclasses.replace(case.config, **change), case.checkpoint.dense, "w.pt")


def test_action_weights_must_be_the_checkpoints(case: GoldenCase) -> None:
    other = dataclasses.replace(case.config, action_weights=(1, 2, 4, 8, 32))
    with pytest.raises(ArtefactError, match=r"w\.pt: _combined_action_weights is \[1, 2, 4, 8, 16\] in the checkpoint"):
        load_dense(DlrmHstu(other), case.checkpoint.dense, "w.pt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_time_units_survive_a_checkpoint_of_another_precision(case: GoldenCase, dtype: torch.dtype) -> None:
    cast = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in case.checkpoint.dense.items()
    }
    loaded = dict(load_dense(DlrmHstu(case.config), cast, "w.pt").named_buffers())
    for name, value in DlrmHstu(case.config).named_buffers():
        assert torch.equal(loaded[name], value), name


def test_other_time_units_are_refused(case: GoldenCase) -> None:
    key = "_hstu_transducer._output_postprocessor._units_per_period"
    with pytest.raises(ArtefactError, match=r"_units_per_period is \[\[12\.0, 7\.0\]\]"):
        load_dense(DlrmHstu(case.config), {**case.checkpoint.dense, key: torch.tensor([[12.0, 7.0]])}, "w.pt")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (7e4, torch.float16)])
def test_weights_must_be_finite_in_the_models_precision(case: GoldenCase, value: float, dtype: torch.dtype) -> None:
    key = "_item_embedding_mlp.0.weight"
    dense = {**case.checkpoint.dense, key: torch.full_like(case.checkpoint.dense[key], value)}
    with pytest.raises(ArtefactError, match=rf"NaN or Inf in 1 tensors\n  {key} in {dtype}"):
        load_dense(cast_to(DlrmHstu(case.config), dtype), dense, "w.pt")


def table(name: str, dim: int = 32) -> TableSource:
    return TableSource(name=name, rows=5, dim=dim, dtype="float16", blocks=lambda: iter([]))


def test_tables_are_found_by_name_partner_and_prefix() -> None:
    for case_name in ("caseA", "caseB", "caseB3"):
        loaded = load_case(case_name)
        unhinted = resolve_tables(dataclasses.replace(loaded.config, tables=()), loaded.checkpoint.tables, {})
        assert unhinted.tables == loaded.config.tables


def test_a_feature_without_table_is_named_with_the_remedy(case: GoldenCase) -> None:
    config = dataclasses.replace(case.config, tables=())
    with pytest.raises(ConfigError, match=r"'user_id'.*\"embedding_tables\""):
        resolve_tables(config, {n: table(n) for n in ("item_id", "item_category_id")}, {})


def test_tables_that_the_config_lists_and_the_checkpoint_lacks(case: GoldenCase) -> None:
    """The remedy is in the checkpoint then: the config has what the other message asks for."""
    with pytest.raises(ConfigError, match=r"must hold .*_embedding_collection\.embeddings\.user_id\.weight") as error:
        resolve_tables(case.config, {}, {})
    assert "Add to the config" not in str(error.value)


def test_the_config_decides_over_names(case: GoldenCase) -> None:
    listed = (TableConfig(name="shared", rows=5, dim=32, dtype="float16", features=case.config.embedding_features),)
    config = dataclasses.replace(case.config, tables=listed)
    resolved = resolve_tables(config, {n: table(n) for n in ("shared", "item_id", "user_id")}, {})
    assert [t.name for t in resolved.tables] == ["shared"]


def test_comments_of_the_config_file_fill_what_names_leave_open(case: GoldenCase) -> None:
    """Comments are ignored wherever names give a table, and wherever they name one that is not there."""
    config = dataclasses.replace(case.config, tables=())
    tables = {n: table(n) for n in ("item_id", "user_id", "shared")}
    hints = dict.fromkeys(case.config.embedding_features, "shared")
    resolved = resolve_tables(config, tables, hints)
    assert {t.name: t.features for t in resolved.tables} == {
        "item_id": ("item_id", "item_candidate_id"),
        "user_id": ("user_id",),
        "shared": ("item_category_id", "item_candidate_category_id"),
    }
    with pytest.raises(ConfigError, match="'item_category_id'"):
        resolve_tables(config, tables, dict.fromkeys(hints, "nowhere"))


def test_a_table_of_another_width_is_refused(case: GoldenCase) -> None:
    wide = {t.name: table(t.name, dim=64) for t in case.config.tables}
    with pytest.raises(ArtefactError, match="is 64 wide, the config's embedding dim is 32"):
        resolve_tables(case.config, wide, {})


def test_random_weights_are_seeded() -> None:
    small = tuple(dataclasses.replace(t, rows=50) for t in debug().tables)
    config = dataclasses.replace(debug(), tables=small)
    a, b, other = (random_checkpoint(config, seed) for seed in (5, 5, 6))
    assert all(torch.equal(a.dense[key], b.dense[key]) for key in a.dense)
    assert not torch.equal(a.dense["_item_embedding_mlp.0.weight"], other.dense["_item_embedding_mlp.0.weight"])
    a_rows, b_rows, other_rows = (np.concatenate(list(one.tables["item_id"].blocks())) for one in (a, b, other))
    np.testing.assert_array_equal(a_rows, b_rows)
    assert not np.array_equal(a_rows, other_rows)


def test_random_weights_need_table_sizes() -> None:
    with pytest.raises(ConfigError, match="embedding_tables"):
        random_checkpoint(dataclasses.replace(dlrm_v3(), tables=()), 1)


def test_safetensors_without_tables_is_refused_for_a_ranking_model(tmp_path: Path, case: GoldenCase) -> None:
    state = load_file(GOLDEN / "caseA" / "state_dict.safetensors")
    save_file({k: v for k, v in state.items() if "embeddings" not in k.split(".")}, tmp_path / "d.safetensors")
    with pytest.raises(ConfigError, match="the checkpoint has none"):
        resolve_tables(case.config, load_checkpoint(tmp_path / "d.safetensors").tables, {})
