"""Stages without Triton: joining requests into batches, the id policies, errors of one request among others."""

import numpy as np
import pytest

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import IdRule, write_table, write_tables_manifest
from hstu_trt.contract.tensors import FUSED
from hstu_trt.serving.models.stages import FusedStage, RunnerStage
from hstu_trt.serving.requests import one_user, pack, sample
from hstu_trt.tables.ids import apply_policy
from hstu_trt.tables.lookup_stage import HostLookup

TABLE = TableConfig(name="items", rows=5, dim=4, dtype="float16", features=("a", "b"))


class SumRunner:
    """Scores a candidate by its ids, plus the sum of its user's history ids."""

    def __init__(self, model):
        self.spec = model.specs[FUSED]
        self.users_per_batch = []

    def infer(self, feed):
        assert {name for name in feed} == {spec.name for spec in self.spec.inputs}
        users = len(feed["uih_offsets"]) - 1
        self.users_per_batch.append(users)
        assert feed["contextual_ids"].shape == (users, 1)
        history = np.add.reduceat(np.append(feed["uih_ids"], 0), 2 * feed["uih_offsets"][:-1])
        history[np.diff(feed["uih_offsets"]) == 0] = 0
        owner = np.repeat(np.arange(users), np.diff(feed["candidate_offsets"]))
        return {"preds": (feed["candidate_ids"].reshape(-1, 2).sum(1) + history[owner])[:, None].astype(np.float32)}


@pytest.fixture
def model(make_model):
    return make_model()


def fused(model, policy="reject"):
    runner = SumRunner(model)
    return FusedStage(model, runner, 7.0, policy), runner


def request_of(model, events, items, seed=0):
    request = sample(model.ranking_config, model.limits, seed=seed)
    history = {name: values[:events] for name, values in request.history.items()}
    candidates = {name: values[:items] for name, values in request.candidates.items()}
    request = type(request)(user=request.user, history=history, candidates=candidates)
    return one_user(pack(model.ranking_config, [request]))


def expected(request):
    return request["candidate_ids"].reshape(-1, 2).sum(1) + request["uih_ids"].sum()


def test_mixed_lengths_are_joined_and_split(model):
    stage, runner = fused(model)
    requests = [request_of(model, events, items, events) for events, items in ((3, 2), (0, 1), (8, 5))]
    for request, scores in zip(requests, stage.infer_many(requests), strict=True):
        assert scores.shape == (1, request["candidate_timestamps"].size, 1)
        assert scores.ravel().tolist() == expected(request).tolist()
    assert runner.users_per_batch == [3]


def test_batches_stay_within_the_limits(model):
    stage, runner = fused(model)
    stage.infer_many([request_of(model, 8, 5)] * 5)
    assert runner.users_per_batch == [2, 2, 1], "12 candidates per batch: 5 + 5 fit"
    stage, runner = fused(model)
    stage.infer_many([request_of(model, 1, 1)] * 5)
    assert runner.users_per_batch == [4, 1], "4 users per batch"


def test_request_of_two_users(model):
    stage, _ = fused(model)
    one, other = request_of(model, 3, 2, 1), request_of(model, 3, 2, 2)
    both = {name: np.concatenate([one[name], other[name]]) for name in one}
    (scores,) = stage.infer_many([both])
    assert scores.shape == (2, 2, 1)
    assert scores[0].ravel().tolist() == expected(one).tolist()
    assert scores[1].ravel().tolist() == expected(other).tolist()


def test_bad_request_leaves_its_batch_mates_alone(model):
    stage, _ = fused(model)
    good, bad = request_of(model, 3, 2), request_of(model, 3, 2)
    bad["uih_ids"] = bad["uih_ids"].copy()
    bad["uih_ids"][0, 3] = 99
    first, error, last = stage.infer_many([good, bad, good])
    assert isinstance(error, InputError)
    assert "'uih_ids' (feature 'item_category_id') holds 99 at [1, 1]" in str(error)
    assert first.tolist() == last.tolist() == stage.infer_many([good])[0].tolist()


def test_the_default_row_stands_in_for_a_bad_id(make_model):
    """As the host tier answers it: by the table's manifest."""
    model = make_model()
    rule = IdRule(default_row=4)
    rows = np.arange(36, dtype=np.float16).reshape(9, 4)
    tables = [
        write_table(model.tables, table, [rows], ids=rule if table.name == "item_id" else None)
        for table in model.ranking_config.tables
    ]
    write_tables_manifest(model.tables, tables, "a test", {})
    stage, _ = fused(model, "default_row")
    request = request_of(model, 3, 2)
    request["candidate_ids"] = np.asarray([[99, 1, -7, 2]])
    (scores,) = stage.infer_many([request])
    assert (scores.ravel() - request["uih_ids"].sum()).tolist() == [4 + 1, 4 + 2]
    ids = {"uih_ids": [[0, 0]], "candidate_ids": [[99, 1]], "contextual_ids": [[0]]}
    looked_up = HostLookup(model, "default_row").infer({name: np.asarray(value) for name, value in ids.items()})
    assert looked_up["candidate_embeddings"].tolist() == [[*rows[4], *rows[1]]]


def test_all_bad_requests_run_nothing(model):
    stage, runner = fused(model)
    bad = request_of(model, 3, 2) | {"uih_timestamps": np.zeros((1, 2), np.int64)}
    (error,) = stage.infer_many([bad])
    assert "'uih_ids' has shape [1, 6], but 'uih_timestamps' has [1, 2], so [1, 4] is needed" in str(error)
    assert runner.users_per_batch == []


@pytest.mark.parametrize(("events", "items", "names"), [(3, 0, "candidate"), (17, 2, "17"), (3, 7, "7")])
def test_fused_refuses_beyond_the_limits(model, events, items, names):
    stage, _ = fused(model)
    request = request_of(model, 3, 2)
    counts = {"uih": events, "candidate": items}
    for name in request:
        group, _, what = name.partition("_")
        if group in counts:
            request[name] = np.zeros((1, counts[group] * (2 if what == "ids" else 1)), np.int64)
    (error,) = stage.infer_many([request])
    assert isinstance(error, InputError)
    assert names in str(error)


POLICIES = {
    "reject in range": ("reject", None, [[0, 4]], [[0, 4]]),
    "reject passes padding": ("reject", -1, [[-1, 4]], [[-1, 4]]),
    "clamp": ("clamp", None, [[-1, 5], [4, 99]], [[0, 4], [4, 4]]),
    "clamp keeps padding": ("clamp", -1, [[-1, 5]], [[-1, 4]]),
    "zero leaves it to the graph": ("zero", None, [[-7, 99]], [[-7, 99]]),
    "no rows": ("reject", None, np.empty((0, 2)), np.empty((0, 2))),
}


@pytest.mark.parametrize(("policy", "padding", "ids", "wanted"), POLICIES.values(), ids=POLICIES)
def test_id_policy(policy, padding, ids, wanted):
    ids = np.asarray(ids, np.int64)
    found = apply_policy(ids, ("a", "b"), (TABLE, TABLE), policy=policy, padding_id=padding, what="uih_ids")
    assert found.tolist() == np.asarray(wanted).tolist()


def test_default_rows_stand_in_for_bad_ids():
    ids = np.asarray([[-1, 99], [5, -1], [4, 0]], np.int64)
    options = {"policy": "default_row", "what": "uih_ids"}
    found = apply_policy(ids, ("a", "b"), (TABLE, TABLE), padding_id=None, default_rows=(3, None), **options)
    assert found.tolist() == [[3, -1], [3, -1], [4, 0]]
    found = apply_policy(ids, ("a", "b"), (TABLE, TABLE), padding_id=-1, default_rows=(3, 2), **options)
    assert found.tolist() == [[-1, 2], [3, -1], [4, 0]]
    assert apply_policy(ids, ("a", "b"), (TABLE, TABLE), padding_id=None, **options).tolist()[0] == [-1, -1]


@pytest.mark.parametrize("value", [-1, 5, np.iinfo(np.int64).max, np.iinfo(np.int64).min])
def test_rejected_id_is_named(value):
    ids = np.asarray([[0, 0], [0, value]], np.int64)
    with pytest.raises(InputError, match=rf"'uih_ids' \(feature 'b'\) holds {value} at \[1, 1\].*0 to 4"):
        apply_policy(ids, ("a", "b"), (TABLE, TABLE), policy="reject", padding_id=None, what="uih_ids")


@pytest.mark.parametrize("policy", ["reject", "clamp"])
def test_table_without_rows_has_no_nearest_row(policy):
    empty = TableConfig(name="none", rows=0, dim=4, dtype="float16", features=("b",))
    with pytest.raises(InputError, match=r"holds 3 at \[0, 1\]; table 'none' has no rows"):
        apply_policy(np.asarray([[0, 3]]), ("a", "b"), (TABLE, empty), policy=policy, padding_id=None, what="uih_ids")


def test_lookup_lays_features_side_by_side(model):
    ids = {"uih_ids": [[1, 2]], "candidate_ids": [[0, 0]], "contextual_ids": [[-1]]}
    rows = HostLookup(model, "reject").infer({name: np.asarray(value) for name, value in ids.items()})
    assert rows["uih_embeddings"].tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert rows["contextual_embeddings"].tolist() == [[0, 0, 0, 0]], "a missing slot"


def test_lookup_rejects_padding_outside_contextual_slots(model):
    ids = {"uih_ids": [[-1, 2]], "candidate_ids": [[0, 0]], "contextual_ids": [[-1]]}
    with pytest.raises(InputError, match=r"'uih_ids'.* holds -1 at \[0, 0\]"):
        HostLookup(model, "reject").infer({name: np.asarray(value) for name, value in ids.items()})


def test_runner_stage_adds_the_norm():
    class Echo:
        def infer(self, feed):
            return dict(feed)

    answer = RunnerStage(Echo(), 7.0).infer({"x": np.ones(1)})
    assert answer["attention_norm"].tolist() == [7.0]
    assert answer["attention_norm"].dtype == np.float32
    assert "attention_norm" not in RunnerStage(Echo(), None).infer({})
