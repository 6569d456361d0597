"""Packing and checking requests: the packed tensors, and what each refusal says."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Jagged, batch_max_norm, check_finite, check_request, offsets_of, pack_request
from hstu_trt.contract.model import ContextualFeature
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import PADDING_ID, Limits, stage_specs

CONFIG = dataclasses.replace(
    debug(),
    contextual_features=(ContextualFeature(name="user_id", slots=1), ContextualFeature(name="city", slots=2)),
    user_embedding_features=(*debug().user_embedding_features, "city"),
)
LIMITS = Limits(users=3, history=5, candidates=4, batch_history=9, batch_candidates=8)
RANKING = stage_specs(CONFIG, LIMITS, "fp32")["ranking"]
HSTU = stage_specs(CONFIG, LIMITS, "fp32")["hstu"]


def request_features(histories=(2, 0), candidates=(1, 3), cities=((7,), (1, 2, 3))):
    """Features whose values count up, so that every value tells where it came from."""
    h, c = list(histories), list(candidates)
    uih_names = ("item_id", "item_category_id", "action_timestamp", "item_weights")
    uih = {name: Jagged.of(name, np.arange(sum(h)) + 100 * i, h) for i, name in enumerate(uih_names)}
    uih["user_id"] = Jagged.of_lists("user_id", [[u] for u in range(len(h))])
    uih["city"] = Jagged.of_lists("city", cities)
    item_names = ("item_candidate_id", "item_candidate_category_id", "item_query_time")
    return uih, {name: Jagged.of(name, np.arange(sum(c)) + 1000 * i, c) for i, name in enumerate(item_names)}


def packed(**changes):
    return {**pack_request(CONFIG, *request_features()), **changes}


def test_features_become_columns():
    tensors = packed()
    assert tensors["uih_ids"].tolist() == [[0, 100], [1, 101]]
    assert tensors["uih_timestamps"].tolist() == [200, 201]
    assert tensors["uih_actions"].tolist() == [300, 301]
    assert tensors["candidate_ids"].tolist() == [[0, 1000], [1, 1001], [2, 1002], [3, 1003]]
    assert tensors["candidate_timestamps"].tolist() == [2000, 2001, 2002, 2003]
    assert tensors["uih_offsets"].tolist() == [0, 2, 2]
    assert tensors["candidate_offsets"].tolist() == [0, 1, 4]


def test_contextual_ids_are_padded_and_cut():
    assert packed()["contextual_ids"].tolist() == [[0, 7, PADDING_ID], [1, 1, 2]]


@pytest.mark.parametrize(
    ("cities", "rows"),
    [
        (((), ()), [[-1, -1], [-1, -1]]),
        (((), (5,)), [[-1, -1], [5, -1]]),
        (((4, 5, 6, 7), ()), [[4, 5], [-1, -1]]),
    ],
)
def test_missing_and_surplus_contextual_ids(cities, rows):
    uih, candidates = request_features(cities=cities)
    assert pack_request(CONFIG, uih, candidates)["contextual_ids"][:, 1:].tolist() == rows


def test_a_packed_request_passes_the_check():
    check_request(packed(), RANKING, LIMITS)


def test_optional_tensors_are_left_out():
    config = dataclasses.replace(CONFIG, contextual_features=(), action_weights=None)
    assert not {"contextual_ids", "uih_actions"} & set(pack_request(config, *request_features()))


lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=12)


@given(lengths)
def test_offsets_cut_every_user_out_again(users):
    histories, candidates = zip(*users, strict=True)
    uih, items = request_features(histories, candidates, cities=[[9]] * len(users))
    tensors = pack_request(CONFIG, uih, items)
    for name, feature in (("uih", uih["item_id"]), ("candidate", items["item_candidate_id"])):
        offsets = tensors[f"{name}_offsets"]
        assert offsets.dtype == np.int32
        assert np.diff(offsets).tolist() == feature.lengths.tolist()
        cut = [tensors[f"{name}_ids"][a:b, 0] for a, b in itertools.pairwise(offsets)]
        assert np.concatenate(cut).tolist() == feature.values.tolist()


@given(st.lists(st.integers(0, 1000)))
def test_offsets_are_running_sums(counts):
    offsets = offsets_of(np.asarray(counts, dtype=np.int64))
    assert offsets[0] == 0
    assert np.diff(offsets).tolist() == counts


BAD_FEATURES = [
    ([[1]], [1], "feature 'f': values must be 1-D, got shape \\[1, 1\\]"),
    ([1], [[1]], "feature 'f': lengths must be 1-D"),
    ([1.5], [1], "feature 'f': values must be integers that fit int64, got float64"),
    ([1], [1.0], "feature 'f': lengths must be integers that fit int64, got float64"),
    ([1], [2, -1], r"feature 'f': lengths\[1\] is -1"),
    ([1, 2], [1], "feature 'f': lengths sum to 1, but there are 2 values"),
    (["a"], [1], "feature 'f': values must be integers"),
    (np.array([2**63], dtype=np.uint64), [1], "feature 'f': values must be integers that fit int64, got uint64"),
]


@pytest.mark.parametrize(("values", "counts", "message"), BAD_FEATURES)
def test_a_bad_feature_is_named(values, counts, message):
    with pytest.raises(InputError, match=message):
        Jagged.of("f", values, counts)


def test_an_empty_feature_is_fine():
    assert Jagged.of("f", [], [0, 0]).values.dtype == np.int64


BAD_REQUESTS = [
    ("uih", "item_id", None, "history feature 'item_id' is missing; given: "),
    ("uih", "item_weights", None, "payload feature 'item_weights' is missing"),
    ("uih", "user_id", None, "contextual feature 'user_id' is missing"),
    ("candidates", "item_query_time", None, "payload feature 'item_query_time' is missing"),
    ("uih", "item_category_id", ([1, 2], [1, 1]), "'item_category_id' has length 1 for user 0, .*'item_id' has 2"),
    ("uih", "item_category_id", ([1, 2], [2]), "'item_category_id' has 1 users, feature 'item_id' has 2"),
    ("uih", "action_timestamp", ([1], [1, 0]), "'action_timestamp' has length 1 for user 0"),
    ("uih", "city", ([1], [1]), "feature 'city' has 1 users, the history has 2"),
    ("candidates", "item_candidate_category_id", ([1], [1, 0]), "has length 0 for user 1"),
]


@pytest.mark.parametrize(("side", "name", "value", "message"), BAD_REQUESTS)
def test_a_bad_request_names_feature_and_user(side, name, value, message):
    uih, candidates = request_features()
    features = {"uih": uih, "candidates": candidates}[side]
    if value is None:
        del features[name]
    else:
        features[name] = Jagged.of(name, *value)
    with pytest.raises(InputError, match=message):
        pack_request(CONFIG, uih, candidates)


def test_history_and_candidates_have_the_same_users():
    with pytest.raises(InputError, match="history features have 2 users, candidate features 1"):
        pack_request(CONFIG, request_features()[0], request_features(candidates=(2,))[1])


def int32(*values):
    return np.asarray(values, dtype=np.int32)


BAD_TENSORS = [
    ("uih_ids", None, r"tensor 'uih_ids' int64 \[uih_tokens, 2\] is missing"),
    ("uih_ids", np.zeros((2, 2), np.int32), "tensor 'uih_ids' must be int64, got int32"),
    ("uih_ids", np.zeros(2, np.int64), r"tensor 'uih_ids' must have shape \[uih_tokens, 2\], got \[2\]"),
    ("uih_ids", np.zeros((2, 3), np.int64), r"tensor 'uih_ids' must have shape \[uih_tokens, 2\], got \[2, 3\]"),
    ("uih_ids", np.zeros((10, 2), np.int64), "'uih_ids' has 10 uih_tokens on axis 0; 0 to 9 are served"),
    ("candidate_ids", np.zeros((0, 2), np.int64), "'candidate_ids' has 0 candidates on axis 0; 1 to 8 are served"),
    ("uih_timestamps", np.zeros(3, np.int64), "'uih_timestamps' has 3 uih_tokens on axis 0, but 'uih_ids' has 2"),
    ("contextual_ids", np.zeros((1, 3), np.int64), "but 'contextual_ids' has 1|has 1 users"),
    ("uih_offsets", int32(1, 2, 2), r"tensor 'uih_offsets' must begin with 0, got 1 at \[0\]"),
    ("uih_offsets", int32(0, 3, 2), r"tensor 'uih_offsets' falls from 3 at \[1\] to 2 at \[2\]"),
    ("uih_offsets", int32(0, 1, 1), r"'uih_offsets' ends with 1 at \[2\], but 'uih_timestamps' has 2"),
    ("candidate_offsets", int32(0, 0, 4), r"user 0 has no candidates \('candidate_offsets'\); at least one is needed"),
    ("candidate_offsets", int32(0, 4), "'candidate_offsets' has 2 users_plus_1 on axis 0, but 'uih_offsets' has 3"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_TENSORS)
def test_a_bad_tensor_is_named(name, value, message):
    tensors = packed()
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    with pytest.raises(InputError, match=message):
        check_request(tensors, RANKING, LIMITS)


def test_a_history_beyond_the_limit_names_the_user():
    tensors = pack_request(CONFIG, *request_features(histories=(1, 6)))
    with pytest.raises(InputError, match=r"user 1 has 6 history events \('uih_offsets'\); at most 5 are served"):
        check_request(tensors, RANKING, LIMITS)


def test_candidates_beyond_the_limit_name_the_user():
    tensors = pack_request(CONFIG, *request_features(candidates=(5, 1)))
    with pytest.raises(InputError, match=r"user 0 has 5 candidates \('candidate_offsets'\); at most 4 are served"):
        check_request(tensors, RANKING, LIMITS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_located(bad):
    array = np.zeros((3, 2), np.float32)
    array[2, 1] = bad
    with pytest.raises(InputError, match=rf"tensor 'x' holds {bad} at \[2, 1\]"):
        check_finite("x", array)


def test_floating_inputs_of_a_stage_are_checked_for_nan():
    tensors = {**packed(), "attention_norm": np.asarray([np.nan], np.float32)}
    for spec in HSTU.inputs:
        if spec.name.endswith("_embeddings"):
            tokens = len(tensors[spec.name.replace("embeddings", "ids")])
            tensors[spec.name] = np.zeros((tokens, spec.dims[1]), np.float32)
    with pytest.raises(InputError, match=r"tensor 'attention_norm' holds nan at \[0\]"):
        check_request(tensors, HSTU, LIMITS)


@pytest.mark.parametrize(
    ("histories", "candidates", "norm"), [((2, 0), (1, 3), 8.0), ((0,), (1,), 4.0), ((1, 5, 2), (4, 1, 1), 12.0)]
)
def test_batch_max_norm_is_the_references_n(histories, candidates, norm):
    features = request_features(histories, candidates, cities=[[]] * len(histories))
    assert batch_max_norm(CONFIG, pack_request(CONFIG, *features)) == norm


def test_a_contextual_id_that_would_read_as_missing_is_refused():
    uih, candidates = request_features(cities=((7,), (1, PADDING_ID, 3)))
    with pytest.raises(InputError, match=r"'city' holds -1 at \[2\], which marks a missing id"):
        pack_request(CONFIG, uih, candidates)
