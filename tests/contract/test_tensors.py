"""Tensor specs: the stages fit together, and limits contradict themselves in words."""

import dataclasses

import pytest

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import ContextualFeature, ResearchHstuConfig
from hstu_trt.contract.presets import PRESETS, debug
from hstu_trt.contract.tensors import (
    PRECISIONS,
    Dim,
    Limits,
    StageSpec,
    TensorSpec,
    default_limits,
    feature_columns,
    float_dtype,
    research_specs,
    stage_specs,
)

NO_CONTEXT = dataclasses.replace(debug(), contextual_features=())
NO_ACTIONS = dataclasses.replace(debug(), action_weights=None)
SLOTS = dataclasses.replace(debug(), contextual_features=(ContextualFeature(name="user_id", slots=3),))
CONFIGS = {"debug": debug(), "no_context": NO_CONTEXT, "no_actions": NO_ACTIONS, "slots": SLOTS}
LIMITS = Limits(users=4, history=100, candidates=10, batch_history=200, batch_candidates=40)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def names(specs):
    return {spec.name for spec in specs}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_step_of_the_ensemble_is_fed_by_those_before_it(config, precision):
    specs = stage_specs(config, LIMITS, precision)
    have = {spec.name: spec for spec in specs["ranking"].inputs}
    for stage in ("embedding_lookup", "hstu", "mlp_head"):
        for spec in specs[stage].inputs:
            assert spec.name == "attention_norm" or have[spec.name] == spec
        have |= {spec.name: spec for spec in specs[stage].outputs}
    assert all(have[spec.name] == spec for spec in specs["ranking"].outputs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_input_of_the_ensemble_is_used(config, precision):
    specs = stage_specs(config, LIMITS, precision)
    used = set().union(*(names(specs[stage].inputs) for stage in ("embedding_lookup", "hstu", "mlp_head")))
    assert names(specs["ranking"].inputs) <= used


def test_the_fused_model_takes_the_ensembles_tensors_flat(config):
    specs = stage_specs(config, LIMITS, "fp16")
    assert names(specs["ranking_fused"].inputs) == names(specs["ranking"].inputs) | {"attention_norm"}
    for spec in specs["ranking_fused"].inputs:
        assert len(spec.dims) == 1 or spec.name == "contextual_ids"


def test_flat_ids_hold_a_column_per_feature():
    spec = stage_specs(debug(), LIMITS, "fp32")["ranking_fused"].tensor("uih_ids")
    assert spec.dims == (Dim("uih_tokens_x_2", 0, 200, 400),)


def test_optional_tensors_go_with_their_option():
    assert "contextual_ids" not in names(stage_specs(NO_CONTEXT, LIMITS, "fp32")["ranking"].inputs)
    assert "uih_actions" not in names(stage_specs(NO_ACTIONS, LIMITS, "fp32")["ranking"].inputs)
    assert stage_specs(SLOTS, LIMITS, "fp32")["ranking"].tensor("contextual_ids").dims[1] == 3


def test_columns_have_the_widths_of_their_tensors(config):
    ranking = stage_specs(config, LIMITS, "fp32")["ranking"]
    widths = {name: len(features) for name, features in feature_columns(config).items()}
    assert widths == {spec.name: spec.dims[1] for spec in ranking.inputs if spec.name.endswith("_ids")}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("fp8", "float16")])
def test_activations_travel_in_the_precision_and_scores_in_fp32(precision, dtype):
    specs = stage_specs(debug(), LIMITS, precision)
    assert specs["hstu"].tensor("user_embeddings").dtype == dtype
    assert specs["embedding_lookup"].tensor("uih_embeddings").dtype == dtype
    assert specs["mlp_head"].tensor("preds").dtype == "float32"


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="unknown precision 'int3': choose from fp32, fp16"):
        float_dtype("int3")


def test_the_research_stage_has_one_token_dim():
    config = ResearchHstuConfig(layers=1, heads=1, qk_dim=4, v_dim=4, model_dim=8, max_seq_len=16)
    stage = research_specs(config, LIMITS)["sequence_encoder"]
    tokens = {stage.tensor(name).dims[0] for name in ("uih_ids", "uih_timestamps", "next_timestamps", "encoded")}
    assert len(tokens) == 1


@pytest.mark.parametrize("bounds", [(2, 1, 3), (1, 3, 2), (-1, 0, 0), (5, 5, 4)])
def test_a_dim_is_ordered(bounds):
    with pytest.raises(ConfigError, match="dim tokens: needs 0 <= min <= opt <= max"):
        Dim("tokens", *bounds)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
def test_a_limit_is_positive(name):
    with pytest.raises(ConfigError, match=f"limit {name} must be >= 1, got 0"):
        dataclasses.replace(LIMITS, **{name: 0})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
def test_a_limit_fits_the_offsets(name):
    with pytest.raises(ConfigError, match=f"limit {name} must fit INT32, as offsets do: at most 2147483647"):
        dataclasses.replace(LIMITS, **{name: 2**31})


@pytest.mark.parametrize(("one", "batch"), [("history", "batch_history"), ("candidates", "batch_candidates")])
def test_a_batch_holds_at_least_one_user(one, batch):
    with pytest.raises(ConfigError, match=r"the limit of a batch \(7\) is below that of one user \(8\)"):
        dataclasses.replace(LIMITS, **{one: 8, batch: 7})


def test_default_limits_fill_the_sequence():
    limits = default_limits(debug())
    assert limits.history + limits.candidates + 1 == debug().max_seq_len
    assert limits.batch_history == limits.users * limits.history


def test_default_limits_of_a_config_with_more_candidates_than_positions():
    config = dataclasses.replace(debug(), max_seq_len=64, max_candidates=64)
    assert default_limits(config).history == 64


@pytest.mark.parametrize("preset", PRESETS.values())
def test_overrides_replace_limits(preset):
    limits = default_limits(preset(), users=1, history=None, candidates=5)
    assert (limits.users, limits.candidates) == (1, 5)
    assert limits.history == default_limits(preset()).history


def test_a_stage_finds_and_drops_tensors_by_name():
    tensor = TensorSpec("x", "int64", (Dim("tokens", 0, 1, 2), 3))
    stage = StageSpec("s", (tensor,), ())
    assert tensor.shape_text == "[tokens, 3]"
    assert stage.tensor("x") is tensor
    assert stage.without("x").inputs == ()
    with pytest.raises(KeyError):
        stage.tensor("y")
