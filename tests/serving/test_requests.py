"""Requests from Python lists to the tensors of each model."""

import numpy as np
import pytest

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import check_request
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import ENSEMBLE, stage_specs
from hstu_trt.serving.requests import RankRequest, one_user, pack, sample


def request_of(events=3, items=2, **changes):
    history = {
        "item_id": list(range(events)),
        "item_category_id": [1] * events,
        "action_timestamp": [5] * events,
        "item_weights": [1] * events,
    }
    candidates = {
        "item_candidate_id": list(range(items)),
        "item_candidate_category_id": [2] * items,
        "item_query_time": [9] * items,
    }
    return RankRequest(**{"user": {"user_id": 4}, "history": history, "candidates": candidates, **changes})


def test_users_are_packed_end_to_end():
    packed = pack(debug(), [request_of(3, 2), request_of(0, 1)])
    assert packed["uih_offsets"].tolist() == [0, 3, 3]
    assert packed["candidate_offsets"].tolist() == [0, 2, 3]
    assert packed["uih_ids"].tolist() == [[0, 1], [1, 1], [2, 1]]
    assert packed["contextual_ids"].tolist() == [[4], [4]]


def test_one_user_loses_offsets_and_gains_a_batch_dim():
    flat = one_user(pack(debug(), [request_of(3, 2)]))
    assert flat["uih_ids"].tolist() == [[0, 1, 1, 1, 2, 1]]
    assert flat["contextual_ids"].shape == (1, 1)
    assert not any("offsets" in name for name in flat)


BAD = {
    "no users": ([], "at least one"),
    "float ids": ([request_of(user={"user_id": [0.5]})], "'user_id' of user 0 must be a list of integers"),
    "uneven": ([request_of(candidates={"item_candidate_id": [[1], [1, 2]]})], "'item_candidate_id' .* flat list"),
    "beyond int64": ([request_of(user={"user_id": np.uint64(2**64 - 1)})], f"'user_id' of user 0 holds {2**64 - 1} at"),
    "nested": ([request_of(candidates={"item_candidate_id": [[1]]})], "'item_candidate_id' of user 0"),
    "lacking": ([request_of(), request_of(user={})], "'user_id' is given for user 0, but not for user 1"),
    "unequal": ([request_of(history={**request_of().history, "item_weights": [1]})], "'item_weights' has length 1"),
    "missing": ([request_of(candidates={})], "'item_candidate_id' is missing"),
}


@pytest.mark.parametrize(("requests", "names"), BAD.values(), ids=BAD)
def test_bad_request_names_the_feature(requests, names):
    with pytest.raises(InputError, match=names):
        pack(debug(), requests)


@pytest.mark.parametrize("seed", range(5))
def test_sample_fits_every_model(make_model, seed):
    model = make_model()
    config, limits = model.ranking_config, model.limits
    packed = pack(config, [sample(config, limits, seed=seed)])
    check_request(packed, stage_specs(config, limits, "fp32")[ENSEMBLE], limits)
    assert np.diff(packed["uih_offsets"]).item() == 8
