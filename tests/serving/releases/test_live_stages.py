"""Stages answer with the release that a request began with, and name it."""

import json

import numpy as np
import pytest
from release_folders import ROWS, publish, write_model

from hstu_trt.contract.errors import InputError
from hstu_trt.serving.models.live_stages import (
    DenseStages,
    FixedFusedStage,
    FusedRelease,
    LiveFusedStage,
    LiveLookup,
    text_tensor,
)
from hstu_trt.serving.models.stages import FusedStage
from hstu_trt.serving.refresh.releases import Release
from hstu_trt.serving.requests import one_user, pack, sample
from hstu_trt.tables.ids import RowStatus
from hstu_trt.tables.live import Live


class Echo:
    """A stage that answers with a number of its own, and with what it got."""

    def __init__(self, number=0):
        self.number = number
        self.closed = False

    def infer(self, feed):
        assert "dense_id" not in feed
        return {"number": self.number, **feed}


def test_steps_answer_with_the_dense_model_that_is_named(folder):
    models = {"A": folder.model, "B": folder.dense_of(folder.path / "b3")}
    models["C"] = write_model(folder.path / "c9", 1, "C")
    opened = []

    def open_stage(model):
        opened.append(model.pair_id)
        return Echo(model.pair_id)

    stages = DenseStages(folder, open_stage)

    def named(pair):
        return stages.infer({"dense_id": text_tensor(models[pair].digest), "x": 1})

    assert named("A") == {"number": "A", "x": 1}
    stages.hold(models["B"])
    assert [named(pair)["number"] for pair in "ABAB"] == ["A", "B", "A", "B"]
    stages.hold(models["C"])
    assert opened == ["A", "B", "C"]
    assert stages.held == [models["B"].digest, models["C"].digest], "the two newest"
    assert named("A")["number"] == "A", "late, but never mixed"
    assert opened == ["A", "B", "C", "A"]
    for wrong in ("f" * 64, "", "\udcff"):
        with pytest.raises(InputError, match="'dense_id' names no dense model"):
            stages.infer({"dense_id": np.asarray([wrong.encode(errors="surrogateescape")], object)})


def lookup(rows, folder, policy="reject"):
    return LiveLookup(rows.live, folder.model, policy, sends_dense=True)


def ids(value=0):
    feed = {"uih_ids": [[value, 1]] * 3, "candidate_ids": [[2, 2]], "contextual_ids": [[-1]]}
    return {name: np.asarray(array) for name, array in feed.items()}


def test_a_lookup_names_its_tables_and_its_dense_model(folder, place, rows):
    stage = lookup(rows, folder)
    answer = stage.infer(ids())
    assert answer["tables_version"][0].startswith(b"small@")
    assert answer["dense_id"].tolist() == [folder.model.digest.encode()]
    assert answer["row_status"].tolist() == [0, 8, 0, 0, 0, 0, 1]
    publish(folder, "v1")
    rows.watcher.poll()
    answer = stage.infer(ids())
    assert answer["tables_version"][0].startswith(b"v1@")
    assert answer["uih_embeddings"].tolist() == [[2.0] * 8] * 3
    assert "dense_id" not in LiveLookup(rows.live, folder.model, "reject", sends_dense=False).infer(ids())
    board = json.loads((place.board.folder / "embedding_lookup.json").read_text())
    assert board["tables_version"].startswith("v1@")
    assert board["refused"] is None


def test_bad_ids_are_counted_whether_rejected_or_not(folder, rows):
    stage = lookup(rows, folder, "clamp")
    assert stage.infer(ids(ROWS))["row_status"].tolist() == [0, 5, 0, 0, 3, 0, 1]
    rejecting = lookup(rows, folder)
    with pytest.raises(InputError, match=rf"'uih_ids'.*holds {ROWS} at \[0, 0\]"):
        rejecting.infer(ids(ROWS))
    assert stage.tally.take() == ({"host": 5, "bad_id": 3, "padding": 1}, {"item_id": 3})
    assert rejecting.tally.take() == ({}, {"item_id": 3})
    assert stage.tally.take() == ({}, {})


class SumOfRows:
    """``hstu``: a vector per candidate that holds the sum of its user's rows. ``mlp_head``: adds the candidate's."""

    def __init__(self, head=False):
        self.head = head

    def infer(self, feed):
        candidates = feed["candidate_embeddings"].sum(axis=1)
        if self.head:
            return {"preds": (feed["user_embeddings"][:, 0] + candidates)[:, None]}
        owner = np.repeat(np.arange(len(feed["candidate_offsets"]) - 1), np.diff(feed["candidate_offsets"]))
        sums = np.add.reduceat(np.append(feed["uih_embeddings"].sum(axis=1), 0), feed["uih_offsets"][:-1])
        sums[np.diff(feed["uih_offsets"]) == 0] = 0
        return {"user_embeddings": sums[owner][:, None]}


def fused_requests(model, count=3):
    return [
        one_user(pack(model.ranking_config, [sample(model.ranking_config, model.limits, seed=seed)]))
        for seed in range(count)
    ]


def test_fused_batches_name_their_release_and_spare_the_good(folder, rows):
    release = rows.live.current
    live = Live(FusedRelease(release.tables, release.dense, steps=(SumOfRows(), SumOfRows(head=True))))
    stage = LiveFusedStage(live, folder.model, "reject")
    first, bad, last = fused_requests(folder.model)
    bad = bad | {"uih_ids": bad["uih_ids"] + ROWS}
    two = {name: np.concatenate([array, array]) for name, array in last.items()}
    answers = stage.answer_many([first, bad, two])
    assert isinstance(answers[1], InputError)
    # Every row is ones: 8 events and the candidate, of 2 features of 4 values each.
    events, users = first["uih_timestamps"].shape[1], 2
    for answer, number in ((answers[0], 1), (answers[2], users)):
        assert answer.scores.shape == (number, 5, 1)
        assert set(answer.scores.ravel().tolist()) == {8.0 * (events + 1)}
        assert answer.version == release.tables.label
        assert answer.row_status.tolist() == [[0, 2 * (events + 5) + 1, 0, 0, 0, 0, 0]] * number
    assert stage.answer_many([bad]) != []


def test_an_engine_with_tables_of_its_own_names_them(folder):
    class Zeros:
        spec = folder.model.specs["ranking_fused"]

        def infer(self, feed):
            return {"preds": np.zeros((len(feed["candidate_timestamps"]), 1), np.float32)}

    stage = FixedFusedStage(FusedStage(folder.model, Zeros(), 7.0, "reject"), folder.model)
    (request,) = fused_requests(folder.model, 1)
    answer, error = stage.answer_many([request, request | {"uih_ids": request["uih_ids"] + 99}])
    assert answer.version.startswith("small@")
    assert answer.row_status.sum() == sum(request[name].size for name in ("uih_ids", "candidate_ids", "contextual_ids"))
    assert isinstance(error, InputError)


@pytest.mark.parametrize("policy", ["clamp", "zero", "row0", "default_row", "reject"])
def test_an_engine_with_tables_of_its_own_counts_bad_ids_and_padding(folder, policy):
    class Zeros:
        spec = folder.model.specs["ranking_fused"]

        def infer(self, feed):
            return {"preds": np.zeros((len(feed["candidate_timestamps"]), 1), np.float32)}

    stage = FixedFusedStage(FusedStage(folder.model, Zeros(), 7.0, policy), folder.model)
    (request,) = fused_requests(folder.model, 1)
    ids = {name: request[name].copy() for name in ("uih_ids", "contextual_ids")}
    ids["uih_ids"][0, :2], ids["contextual_ids"][0, 0] = (-1, ROWS), -1
    (answer,) = stage.answer_many([request | ids])
    rows, bad = stage.tally.take()
    table = folder.model.ranking_config.table_of(folder.model.ranking_config.uih_features[0]).name
    assert sum(bad.values()) == 2
    assert bad[table] >= 1
    if policy == "reject":
        assert isinstance(answer, InputError)
        assert rows == {}
        return
    total = sum(request[name].size for name in ("uih_ids", "candidate_ids", "contextual_ids"))
    assert rows == {"gpu": total - 3, "padding": 1, "bad_id": 2}
    assert answer.row_status[0, RowStatus.BAD_ID] == 2
    assert stage.serves()["tables_version"] == answer.version


def test_a_release_closes_what_is_its_own():
    closed = []

    class Tables:
        def close(self):
            closed.append("tables")

    Release(Tables(), None).close()
    assert closed == ["tables"]
