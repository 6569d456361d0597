"""Model configs refuse contradictions in words, and derive columns as the reference orders them."""

import dataclasses
import math

import pytest

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import AttentionOptions, ContextualFeature, ResearchHstuConfig, TableConfig, TaskConfig
from hstu_trt.contract.presets import PRESETS, debug, dlrm_v3

BINARY = TaskConfig(name="click", kind="binary")
REGRESSION = TaskConfig(name="dwell", kind="regression")

REFUSED = [
    ({"layers": 0}, "layers must be a whole number > 0, got 0"),
    ({"heads": -1}, "heads must be a whole number > 0, got -1"),
    ({"qk_dim": 0}, "qk_dim must be a whole number > 0"),
    ({"v_dim": 0}, "v_dim must be a whole number > 0"),
    ({"embedding_dim": 0}, "embedding_dim must be a whole number > 0"),
    ({"model_dim": 0}, "model_dim must be a whole number > 0"),
    ({"preprocessor_dim": 0}, "preprocessor_dim must be a whole number > 0"),
    ({"tasks": ()}, "at least one task"),
    ({"tasks": (REGRESSION, BINARY)}, "binary tasks .* before regression tasks"),
    ({"post_id_feature": "nobody"}, "no pair for the post id feature 'nobody'"),
    ({"action_weights": ()}, "action_weights is empty: write null"),
    ({"action_weight_feature": None}, "uih_weight_feature_name is not: name the feature"),
    ({"contextual_features": (ContextualFeature(name="city", slots=1),)}, "feature 'city' is looked up but"),
    ({"contextual_features": (ContextualFeature(name="user_id", slots=0),)}, "'user_id' needs at least one slot"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_contradiction_is_refused_in_words(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(debug(), **change)


@pytest.mark.parametrize("name", ["max_attn_len", "contextual_seq_len", "min_full_attn_seq_len"])
def test_attention_options_are_not_negative(name):
    with pytest.raises(ConfigError, match=f"{name} must be a whole number >= 0, got -1"):
        AttentionOptions(**{name: -1})


def test_a_research_config_is_checked_too():
    with pytest.raises(ConfigError, match="heads must be a whole number > 0"):
        ResearchHstuConfig(layers=1, heads=0, qk_dim=1, v_dim=1, model_dim=1, max_seq_len=1)


@pytest.mark.parametrize("preset", PRESETS.values())
def test_a_preset_has_a_table_for_every_feature(preset):
    config = preset()
    assert {config.table_of(feature).dim for feature in config.embedding_features} == {config.embedding_dim}


def test_columns_of_the_dlrm_v3_preset():
    config = dlrm_v3()
    assert config.uih_features == ("item_id", "item_category_id")
    assert config.candidate_features == ("item_candidate_id", "item_candidate_category_id")
    assert config.contextual_slots == ("user_id",)
    assert config.alpha == 1 / math.sqrt(128)


def test_a_partner_outside_the_item_tower_is_a_column_of_its_own():
    config = dataclasses.replace(
        debug(),
        item_embedding_features=("item_candidate_category_id",),
        user_embedding_features=("item_id", "item_candidate_id", "user_id"),
    )
    assert config.uih_features == ("item_id",)
    assert config.candidate_features == ("item_candidate_category_id", "item_candidate_id")


def test_contextual_slots_repeat_their_feature():
    slots = (ContextualFeature(name="user_id", slots=2), ContextualFeature(name="item_id", slots=1))
    config = dataclasses.replace(debug(), contextual_features=slots)
    assert config.contextual_slots == ("user_id", "user_id", "item_id")
    assert config.embedding_features.count("user_id") == 1


def test_alpha_is_taken_as_given():
    assert dataclasses.replace(debug(), attention=AttentionOptions(alpha=0.25)).alpha == 0.25


def test_a_feature_without_a_table_is_named():
    only = TableConfig(name="t", rows=1, dim=64, dtype="float16", features=("item_id",))
    with pytest.raises(ConfigError, match=r"no embedding table for feature 'user_id'; tables: \['t'\]"):
        dataclasses.replace(debug(), tables=(only,)).table_of("user_id")
