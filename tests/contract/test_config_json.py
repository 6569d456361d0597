"""Configs as JSON: the reference's own files are read, and every config survives the round trip."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_trt.contract.config_json import config_from_json, config_to_json, load_config
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import AttentionOptions, ContextualFeature, ResearchHstuConfig, TableConfig, TaskConfig
from hstu_trt.contract.presets import PRESETS, debug

counts = st.integers(1, 1 << 20)
windows = st.integers(0, 1 << 16)
names = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def ranking_configs(draw):
    kinds = sorted(draw(st.lists(st.sampled_from(["binary", "regression"]), min_size=1, max_size=4)))
    slots = [("user_id", 1), ("item_id", 2), ("item_category_id", 7)]
    return dataclasses.replace(
        debug(),
        layers=draw(counts),
        qk_dim=draw(counts),
        v_dim=draw(counts),
        group_norm=draw(st.booleans()),
        postprocessor=draw(st.sampled_from(["l2_norm", "layer_norm", "timestamp"])),
        time_bucket_clamp=draw(st.sampled_from(["rows", "dim"])),
        action_weights=draw(st.none() | st.lists(counts, min_size=1).map(tuple)),
        tasks=tuple(TaskConfig(name=draw(names), kind=kind, weight=draw(counts)) for kind in kinds),
        attention=AttentionOptions(
            alpha=draw(st.none() | st.floats(0.01, 4)), max_attn_len=draw(windows), contextual_seq_len=draw(windows)
        ),
        contextual_features=tuple(
            ContextualFeature(name=name, slots=count, min_sequence=draw(windows))
            for name, count in draw(st.lists(st.sampled_from(slots), unique=True))
        ),
        tables=draw(st.sampled_from([(), debug().tables])),
    )


research_configs = st.builds(
    ResearchHstuConfig,
    layers=counts,
    heads=counts,
    qk_dim=counts,
    v_dim=counts,
    model_dim=counts,
    max_seq_len=counts,
    concat_ua=st.booleans(),
    postprocessor=st.sampled_from(["l2_norm", "layer_norm"]),
    eps=st.floats(1e-9, 1e-2),
)


@given(ranking_configs() | research_configs)
def test_a_config_survives_the_round_trip(config):
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_loaded_by_name(preset):
    assert load_config(preset) == PRESETS[preset]()


def test_the_reference_config_is_read(golden):
    config = load_config(golden / "caseA/config.json")
    assert (config.layers, config.heads, config.qk_dim, config.v_dim) == (3, 2, 32, 32)
    assert (config.embedding_dim, config.model_dim, config.preprocessor_dim) == (32, 40, 56)
    assert config.contextual_features == (ContextualFeature(name="user_id", slots=1, min_sequence=20),)
    assert config.tasks == (TaskConfig(name="rating", kind="binary", weight=1),)
    assert (config.postprocessor, config.time_bucket_clamp, config.tables) == ("timestamp", "rows", ())
    assert config.action_weights == (1, 2, 4, 8, 16)


def changed(**keys):
    return {**config_to_json(debug()), **keys}


def without(key):
    return {name: value for name, value in config_to_json(debug()).items() if name != key}


REFUSED = [
    (changed(hstu_num_head=2), "unknown key 'hstu_num_head'; did you mean 'hstu_num_heads'?"),
    (changed(zzz=1), "unknown key 'zzz'; start a key with '_'"),
    (without("multitask_configs"), "missing key 'multitask_configs'"),
    (without("hstu_num_heads"), "missing key 'hstu_num_heads'"),
    (changed(hstu_num_heads="two"), "^hstu_num_heads must be a whole number > 0, got 'two'"),
    (changed(hstu_num_heads=None), "^hstu_num_heads must be a whole number > 0, got None"),
    (changed(hstu_attn_num_layers=True), "^hstu_attn_num_layers must be a whole number > 0, got True"),
    (changed(stu_contextual_seq_len=-1), "^stu_contextual_seq_len must be a whole number >= 0, got -1"),
    (changed(multitask_configs=[{"task_name": "x", "task_type": 2}]), "task 'x': task_type must be 0 .* got 2"),
    (changed(multitask_configs=[{"task_type": 0}]), "missing key 'task_name'"),
    (changed(multitask_configs=[{"task_name": "x", "task_type": 0.0}]), "task 'x': task_type must be 0 .* got 0.0"),
    (changed(multitask_configs=[{"task_name": 5, "task_type": 0}]), "the name of a task must be a text, got 5"),
    (changed(multitask_configs=7), "multitask_configs must be a list, got 7"),
    (changed(multitask_configs=["rating"]), "multitask_configs: a task must be a JSON object, got 'rating'"),
    (changed(merge_uih_candidate_feature_mapping=[["a"]]), r"mapping: a pair is .*, got \['a'\]"),
    (changed(merge_uih_candidate_feature_mapping=["ab"]), "mapping: a pair must be a list, got 'ab'"),
    (changed(user_embedding_feature_names="item_id"), "user_embedding_feature_names must be a list, got 'item_id'"),
    (changed(item_embedding_feature_names=[1]), r"item_embedding_feature_names must be a list of names, got \[1\]"),
    (changed(candidates_querytime_feature_name=["x"]), "^candidates_querytime_feature_name must be a feature's name"),
    (changed(uih_weight_feature_name=5), "action_weight_feature must be a feature's name, got 5"),
    (changed(contextual_feature_to_max_length=[1]), "contextual_feature_to_max_length must be a JSON object"),
    # A number that is cut to a whole one would be another model, in silence.
    (changed(contextual_feature_to_max_length={"user_id": 1.7}), "'user_id': its slots must be a whole .* got 1.7"),
    (changed(contextual_feature_to_min_uih_length={"user_id": 0.5}), "'user_id': its least sequence .* got 0.5"),
    (changed(contextual_feature_to_max_length={"user_id": 10**12}), "1000000000000 contextual slots do not fit"),
    (changed(action_weights=[1, 2.5]), "action weight 2.5 is no bit mask"),
    (changed(action_weights=[1, "2"]), "action weight '2' is no bit mask"),
    (changed(action_weights=7), "action_weights must be a list, got 7"),
    (changed(enable_postprocessor="false"), "enable_postprocessor must be true or false, got 'false'"),
    (changed(embedding_tables={"t": 7}), "embedding_tables: table 't' must be a JSON object, got 7"),
    (
        changed(embedding_tables={"t": {"rows": "1", "dim": 2, "dtype": "float16", "features": []}}),
        "table 't': rows must be a whole number >= 0, got '1'",
    ),
    (changed(embedding_tables={"t": {"rows": 1}}), "missing key 'dim'"),
    (changed(embedding_tables={"t": {"rows": 1, "dim": 2, "dtype": "FP16", "features": []}}), "dtype must be .*'FP16'"),
    (changed(time_bucket_clamp="row"), "time_bucket_clamp must be 'rows' or 'dim', got 'row'"),
    (changed(time_bucket_clamp="dim", hstu_transducer_embedding_dim=2050), "a model dim of at most 2049, got 2050"),
    (changed(action_weights=[1, 0]), "action weight 0 is no bit mask"),
    (changed(action_weights=[1 << 62]), "is no bit mask between 1 and"),
    (changed(attn_alpha=0), "attn_alpha is 0"),
    (changed(attn_alpha="big"), "^attn_alpha must be a finite number, got 'big'"),
    (changed(attn_alpha=float("nan")), "^attn_alpha must be a finite number, got nan"),
    (changed(max_attn_len=1.5), "max_attn_len must be a whole number"),
    (changed(hstu_group_norm="false"), "hstu_group_norm must be true or false"),
    (changed(hstu_num_heads=2.0), "heads must be a whole number > 0, got 2.0"),
    (changed(hstu_attn_num_layers=0), "layers must be a whole number > 0"),
]


@pytest.mark.parametrize(("document", "message"), REFUSED)
def test_a_wrong_config_is_refused_in_words(document, message):
    with pytest.raises(ConfigError, match=message):
        config_from_json(document)


RESEARCH = config_to_json(ResearchHstuConfig(layers=2, heads=1, qk_dim=8, v_dim=8, model_dim=16, max_seq_len=50))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_activation": "relu"}, "linear_activation must be 'silu', got 'relu'"),
        ({"postproc": "rms"}, "postproc must be 'l2' or 'ln', got 'rms'"),
        ({"num_head": 1}, "did you mean 'num_heads'?"),
        ({"num_heads": 1.0}, "^num_heads must be a whole number > 0, got 1.0"),
        ({"max_sequence_len": "50"}, "^max_sequence_len must be a whole number > 0, got '50'"),
        ({"max_output_len": -1}, "max_output_len must be a whole number >= 0, got -1"),
        ({"concat_ua": "no"}, "concat_ua must be true or false, got 'no'"),
        ({"eps": float("inf")}, "eps must be a finite number > 0, got inf"),
        ({"eps": -1e-6}, "eps must be a finite number > 0"),
    ],
)
def test_a_wrong_research_config_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        config_from_json({**RESEARCH, **change})


def test_keys_with_an_underscore_are_comments():
    assert config_from_json(changed(_note="from run 7")) == debug()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file, and not a preset \\(debug, dlrm_v3\\)"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}", "config .*config.json: missing key"),
        (b"[" * 100_000, "config .*config.json: not valid JSON"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_folder_in_place_of_a_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"config {tmp_path} cannot be read \\(Is a directory\\)"):
        load_config(tmp_path)


def test_tables_are_part_of_the_document():
    table = TableConfig(name="t", rows=3, dim=4, dtype="float32", features=("item_id",))
    document = config_to_json(dataclasses.replace(debug(), tables=(table,)))
    assert document["embedding_tables"] == {"t": {"rows": 3, "dim": 4, "dtype": "float32", "features": ["item_id"]}}
