"""Tables and dense weights move together or not at all, in processes that hold what a request names."""

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest

from hstu_trt.contract.errors import ArtefactError, ConfigError, HstuTrtError, InputError
from hstu_trt.contract.model_folder import onnx_stages, read_model_folder, write_model_folder
from hstu_trt.contract.table_format import read_tables_folder, write_table, write_tables_manifest
from hstu_trt.contract.table_versions import publish_version, rollback_version, tables_in
from hstu_trt.serving import live_models, pbtxt
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.held import Board
from hstu_trt.serving.live_models import DenseNotReadyError, LiveDense, LiveFused, LiveRows, Place
from hstu_trt.serving.live_stages import (
    DenseLostError,
    DenseStages,
    FixedFusedStage,
    FusedRelease,
    LiveFusedStage,
    LiveLookup,
    text_tensor,
)
from hstu_trt.serving.refresh_settings import RefreshSettings
from hstu_trt.serving.releases import Release, ReleaseFolder, check_published
from hstu_trt.serving.requests import one_user, pack, sample
from hstu_trt.serving.stages import FusedStage
from hstu_trt.serving.watching import Watcher
from hstu_trt.tables.delta import make_delta
from hstu_trt.tables.ids import RowStatus
from hstu_trt.tables.live import Live
from hstu_trt.tables.refresh import VersionOpener
from hstu_trt.tables.remote_resp import RemoteError

from .conftest import LIMITS, small_config

ROWS, DIM = 9, 4


def write_tables(folder, value, pair_id, rows=ROWS, dim=DIM):
    tables = []
    for table in small_config().tables:
        config = dataclasses.replace(table, rows=rows, dim=dim)
        block = np.full((rows, dim), value, np.float16)
        tables.append(write_table(folder, config, [block]))
    write_tables_manifest(folder, tables, "a test", {"pair_id": pair_id})
    return folder


def write_model(folder, value, pair_id, *, config=None, limits=LIMITS, precision="fp32", rows=ROWS, weights=""):
    config = config or small_config()
    config = dataclasses.replace(config, tables=tuple(dataclasses.replace(t, rows=rows) for t in config.tables))
    write_tables(folder / "tables", value, pair_id, rows)
    for name in (*(f"{stage}.onnx" for stage in onnx_stages(config)), "weights.safetensors"):
        (folder / name).write_bytes(f"{name} of {pair_id} {weights}".encode())
    facts = {} if pair_id is None else {"pair_id": pair_id}
    write_model_folder(
        folder, name="small", config=config, limits=limits, precision=precision, made_by="a test", facts=facts
    )
    return read_model_folder(folder)


@pytest.fixture
def folder(tmp_path):
    """A model of the pair A; versions: v1 of A, d2 a delta on it, b3 a model of B, v4 tables of B."""
    model = write_model(tmp_path / "model", 1, "A")
    root = tmp_path / "versions"
    write_tables(root / "v1", 2, "A")
    whole = write_tables(tmp_path / "whole", 2, "A", rows=ROWS + 1)
    make_delta(
        *(read_tables_folder(path, regenerate="") for path in (root / "v1", whole)), root / "d2", lambda *_: None
    )
    write_model(root / "b3", 4, "B")
    write_tables(root / "v4", 5, "B")
    return ReleaseFolder(root, model)


def publish(folder, name):
    publish_version(folder.path / name, regenerate="")


def test_a_version_finds_its_dense_model(folder):
    assert folder.current() is None
    for name in ("v1", "d2"):
        assert folder.dense_of(folder.path / name) is folder.model
    for name in ("b3", "v4"):
        assert folder.dense_of(folder.path / name).digest == read_model_folder(folder.path / "b3").digest
    assert folder.dense_by_digest(folder.model.digest) is folder.model
    with pytest.raises(ArtefactError, match="no model folder of digest ffff"):
        folder.dense_by_digest("f" * 64)


def test_what_cannot_be_served_is_found_before_the_launch(folder):
    assert check_published(folder) is None
    for name in ("v1", "d2", "b3", "v4"):
        publish(folder, name)
        assert check_published(folder).name == name
    shutil.rmtree(folder.path / "b3")
    with pytest.raises(ArtefactError, match="0 model folders"):
        check_published(folder)
    publish(folder, "d2")
    shutil.rmtree(folder.path / "v1")
    with pytest.raises(ArtefactError, match="no whole version"):
        check_published(folder)


UNFIT = {
    "no dense model": (
        lambda root: write_tables(root / "x", 1, "C"),
        "belongs to the dense weights C.*0 model folders",
    ),
    "no pair_id": (lambda root: write_tables(root / "x", 1, None), "does not say which dense weights.*--pair-with"),
    "two dense models": (
        lambda root: [
            write_model(root / "x", 1, "C"),
            write_model(root / "y", 2, "C", weights="other"),
            write_tables(root / "z", 1, "C"),
        ],
        "2 model folders",
    ),
    "other limits": (
        lambda root: write_model(root / "x", 1, "C", limits=dataclasses.replace(LIMITS, users=3)),
        "other limits than the model of this deployment",
    ),
    "other precision": (lambda root: write_model(root / "x", 1, "C", precision="fp16"), "other precision"),
    "other config": (
        lambda root: write_model(root / "x", 1, "C", config=small_config(contextual=False)),
        "other (stages|config)",
    ),
}


@pytest.mark.parametrize(("write", "says"), UNFIT.values(), ids=UNFIT)
def test_versions_without_a_fitting_dense_model_are_refused(folder, write, says):
    write(folder.path)
    version = folder.path / ("z" if (folder.path / "z").exists() else "x")
    with pytest.raises(ArtefactError, match=says):
        folder.dense_of(version)


def test_dense_weights_that_were_exported_again_are_the_same(folder):
    """Newer tables in a second folder, with more rows, of one checkpoint; its weights are in use either way."""
    write_model(folder.path / "b5", 6, "B", rows=ROWS + 2)
    chosen = folder.dense_of(folder.path / "v4")
    assert chosen.digest in {read_model_folder(folder.path / name).digest for name in ("b3", "b5")}
    assert folder.dense_of(folder.path / "v4").digest == chosen.digest
    write_model(folder.path / "b9", 6, "B", weights="other")
    with pytest.raises(ArtefactError, match="2 model folders"):
        folder.dense_of(folder.path / "v4")
    (folder.path / "b9/more.bin").write_bytes(b"x")
    assert folder.dense_of(folder.path / "v4").digest == chosen.digest, "what may not be published is passed over"


def move_behind_link(path, away):
    shutil.move(path, away)
    path.symlink_to(away)


def edit(manifest, change):
    document = json.loads(manifest.read_text())
    change(document)
    manifest.write_text(json.dumps(document))


UNBOUND = {
    "a graph is not listed": (
        lambda b3, away: edit(b3 / "manifest.json", lambda d: d["files"].pop("hstu.onnx")),
        "hstu.onnx is not among the files of its manifest",
    ),
    "the weights are not listed": (
        lambda b3, away: edit(b3 / "manifest.json", lambda d: d["files"].pop("weights.safetensors")),
        "weights.safetensors is not among",
    ),
    "the tables are not listed": (
        lambda b3, away: edit(b3 / "manifest.json", lambda d: d["files"].pop("tables/manifest.json")),
        "tables/manifest.json is not among",
    ),
    "what a graph may name is not listed": (
        lambda b3, away: (b3 / "more.bin").write_bytes(b"x"),
        "more.bin is not among",
    ),
    "a folder behind a link": (lambda b3, away: (b3 / "more").symlink_to("/tmp"), "more is not among"),
    "weights behind a link": (
        lambda b3, away: move_behind_link(b3 / "weights.safetensors", away),
        "weights.safetensors is behind a link",
    ),
    "tables behind a link": (lambda b3, away: move_behind_link(b3 / "tables", away), "behind a link"),
}


@pytest.mark.parametrize(("change", "says"), UNBOUND.values(), ids=UNBOUND)
def test_a_model_whose_digest_does_not_tell_all_is_refused(folder, tmp_path, change, says):
    change(folder.path / "b3", tmp_path / "away")
    with pytest.raises(ArtefactError, match=says):
        folder.dense_of(folder.path / "b3")
    with pytest.raises(ArtefactError, match=says):
        publish(folder, "b3")


def test_models_and_tables_behind_links_are_no_versions(folder, tmp_path):
    move_behind_link(folder.path / "b3", tmp_path / "away")
    with pytest.raises(ArtefactError, match="0 model folders"):
        folder.dense_of(folder.path / "v4")
    move_behind_link(tmp_path / "away/tables", tmp_path / "tables")
    with pytest.raises(ArtefactError, match="a version holds its tables itself"):
        tables_in(tmp_path / "away")


def test_tables_of_a_new_dense_model_may_have_grown(folder):
    write_model(folder.path / "x", 1, "C", rows=ROWS + 5)
    assert folder.dense_of(folder.path / "x").pair_id == "C"


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


def test_the_dense_model_in_use_is_kept_whatever_is_refused(folder, place):
    """Models that the steps open and ``embedding_lookup`` refuses must not drive out the one that serves."""
    digests = {name: write_model(folder.path / name, 1, name).digest for name in ("c4", "c5", "c6")}
    place.name = "hstu"
    place.board.write("embedding_lookup", {"dense": folder.model.digest})
    opened = []
    dense = LiveDense(place, lambda model, step: opened.append(model.pair_id) or AnyStep())
    for name in digests:
        publish(folder, name)
        dense.watcher.poll()
        assert place.board.holds("hstu", folder.model.digest)
        assert len(dense.stages.held) == 2
    assert opened == ["A", "c4", "c5", "c6"]
    dense.stages.infer({"dense_id": text_tensor(digests["c4"])})
    assert place.board.holds("hstu", digests["c4"]), "what is opened for a request is announced as well"
    shutil.rmtree(folder.path / "c5")
    with pytest.raises(DenseLostError, match="the dense model in use is gone"):
        dense.stages.infer({"dense_id": text_tensor(digests["c5"])})


class AnyStep:
    """A step that takes anything."""

    def infer(self, feed):
        return {}


class Told:
    """What a watcher did."""

    def __init__(self, folder, take=lambda version: None):
        self.taken, self.refreshes = [], []
        self.take = take
        self.watcher = Watcher(folder, 0.01, self._take, self.refreshes.append)

    def _take(self, version):
        self.taken.append(version.name)
        self.take(version)

    def poll(self):
        self.watcher.poll()
        return self.taken, [refresh.refused for refresh in self.refreshes]


def test_what_is_published_is_taken_once(folder):
    told = Told(folder)
    assert told.poll() == ([], [])
    for name in ("v1", "d2"):
        publish(folder, name)
        told.poll()
        told.poll()
    assert told.poll() == (["v1", "d2"], [None, None])
    rollback_version(folder.path, regenerate="")
    assert told.poll()[0] == ["v1", "d2", "v1"]


def test_what_was_published_before_is_not_news(folder):
    publish(folder, "v1")
    assert Told(folder).poll() == ([], [])


def test_refusals_are_told_once_and_tried_again_when_published_anew(folder):
    def refuse(version):
        raise ArtefactError(f"{version.name} is bad")

    told = Told(folder, refuse)
    publish(folder, "v1")
    for _ in range(3):
        assert told.poll() == (["v1"], ["v1 is bad"])
    publish(folder, "v1")
    assert told.poll() == (["v1"] * 2, ["v1 is bad"] * 2)


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), RemoteError("away"), DenseNotReadyError("steps")])
def test_what_may_pass_is_tried_again_and_told_once(folder, error):
    """The reason is not the version: a server must not stay behind for good."""
    failures = [error] * 3

    def take(version):
        if failures:
            raise failures.pop()

    told = Told(folder, take)
    publish(folder, "v1")
    for _ in range(200):
        told.poll()
        time.sleep(0.002)
    assert told.taken == ["v1"] * 4
    assert [refresh.refused for refresh in told.refreshes] == [str(error) or "MemoryError", None]


def test_tries_become_rare(folder):
    def take(version):
        raise OSError("disk")

    told = Told(folder, take)
    publish(folder, "v1")
    delays = []
    for _ in range(40):
        told.poll()
        delays.append(round(told.watcher._retry_at - time.monotonic(), 2))
        told.watcher._retry_at = 0
    assert delays == sorted(delays)
    assert delays[0] < 1
    assert 299 < delays[-1] <= 300
    assert len(told.refreshes) == 1


def test_a_watcher_survives_bugs_and_nonsense(folder):
    def fail(version):
        raise ZeroDivisionError

    told = Told(folder, fail)
    publish(folder, "v1")
    assert "ZeroDivisionError" in told.poll()[1][0]
    for content, says in ((b"../model\n", "no name of a version"), (b"gone\n", "is no folder"), (b"\xff", "readable")):
        (folder.path / "CURRENT").write_bytes(content)
        assert says in told.poll()[1][-1]
    (folder.path / "CURRENT").unlink()
    count = len(told.poll()[1])
    told.watcher._every_poll = fail.__call__
    assert "TypeError" in told.poll()[1][-1]
    assert len(told.refreshes) == count + 1


def test_the_board_tells_who_holds_what(tmp_path):
    board = Board(tmp_path, 7)
    assert board.wait_until_held(["hstu"], "x", 0.01) == ["hstu"]
    board.write("hstu", {"holds": ["x"]})
    board.write("mlp_head", {"holds": ["y"]})
    assert board.wait_until_held(["hstu", "mlp_head"], "x", 0.01) == ["mlp_head"]
    assert not Board(tmp_path, 8).holds("hstu", "x"), "another server's"
    (board.folder / "hstu.json").write_text("half")
    assert not board.holds("hstu", "x")
    for model in ("hstu", "mlp_head", "never there"):
        board.remove(model)
    assert not board.folder.exists()


@pytest.fixture
def place(folder, tmp_path):
    return Place.of_server(tmp_path / "run", name="embedding_lookup", folder=folder, poll_s=60.0, tell=lambda _: None)


@pytest.fixture
def rows(place):
    return LiveRows(place, VersionOpener(), dense_is_fixed=False)


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


def test_new_dense_weights_wait_for_the_other_steps(folder, place, rows, monkeypatch):
    monkeypatch.setattr(live_models, "HELD_TIMEOUT_S", 0.05)
    publish(folder, "b3")
    refreshes = []
    place.tell = refreshes.append
    rows.watcher.poll()
    assert refreshes[0].refused.startswith("hstu, mlp_head did not open")
    assert rows.live.current.dense is folder.model
    digest = read_model_folder(folder.path / "b3").digest
    for step in ("hstu", "mlp_head"):
        place.board.write(step, {"holds": [digest]})
    publish(folder, "b3")
    rows.watcher.poll()
    assert refreshes[1].refused is None
    assert rows.live.current.dense.digest == digest
    publish(folder, "v1")
    rows.watcher.poll()
    assert refreshes[2].refused.startswith("hstu, mlp_head did not open"), "the way back waits as well"


def test_waiting_for_the_other_steps_ends_with_the_server(folder, place, rows):
    """Metrics go on while it waits, and unloading does not wait for it."""
    publish(folder, "b3")
    polls = []
    place.poll_s, place.every_poll = 0.01, lambda: polls.append(rows.watcher._stop.set() if len(polls) == 3 else None)
    began = time.monotonic()
    with pytest.raises(DenseNotReadyError, match="did not open"):
        rows._take(folder.path / "b3")
    assert len(polls) == 4
    assert time.monotonic() - began < 10


def test_a_board_that_cannot_be_written_is_the_reason(folder, place, tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    rows = LiveRows(place, VersionOpener(), dense_is_fixed=False)
    began = time.monotonic()
    with pytest.raises(DenseNotReadyError, match=r"cannot tell whether they hold them.*make .*run/live/.* writable"):
        rows._take(folder.path / "b3")
    assert time.monotonic() - began < 10
    rows._take(folder.path / "v1")
    assert rows.live.current.tables.name == "v1", "tables of the same dense weights need no board"


def test_a_start_with_a_bad_version_names_the_way_back(folder, place):
    publish(folder, "v1")
    publish(folder, "v4")
    shutil.rmtree(folder.path / "b3")
    says = f"CURRENT cannot be served: .*0 model folders.*hstu-trt tables rollback {folder.path}"
    for start in (
        lambda: check_published(folder),
        lambda: LiveRows(place, VersionOpener(), dense_is_fixed=False),
        lambda: LiveFused(place, VersionOpener(), lambda model, step: AnyStep()),
        lambda: LiveDense(place, lambda model, step: AnyStep()),
    ):
        with pytest.raises(ArtefactError, match=says):
            start()
    rollback_version(folder.path, regenerate="")
    assert check_published(folder) == folder.path / "v1"


def test_plans_keep_their_dense_weights(folder, place):
    rows = LiveRows(place, VersionOpener(), dense_is_fixed=True)
    refreshes = []
    place.tell = refreshes.append
    for name in ("v1", "b3", "v4"):
        publish(folder, name)
        rows.watcher.poll()
    assert [bool(refresh.refused) for refresh in refreshes] == [False, True, True]
    assert "this deployment's plans are fixed" in refreshes[1].refused
    assert rows.live.current.tables.name == "v1"
    with pytest.raises(HstuTrtError, match="plans are fixed"):
        LiveRows(place, VersionOpener(), dense_is_fixed=True)


def test_tables_of_another_form_are_refused(folder, place, rows):
    refreshes = []
    place.tell = refreshes.append
    write_tables(folder.path / "x", 1, "A", dim=DIM + 4)
    publish(folder, "x")
    rows.watcher.poll()
    assert "rows of width 8 for feature" in refreshes[0].refused
    assert rows.live.current.tables.name == "small"
    board = json.loads((place.board.folder / "embedding_lookup.json").read_text())
    assert board["refused"]["version"] == "x"


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

    Release(Tables(), None, lambda: closed.append("dense")).close()
    assert closed == ["tables", "dense"]


def test_assemble_links_the_folder_of_versions(folder, tmp_path):
    settings = RefreshSettings(tables=folder.path, mode="overlay", memory_bytes=10**9, poll_s=0.5)
    deployment = assemble(folder.model, tmp_path / "out", Options(refresh=settings))
    assert deployment.versions.resolve() == folder.path
    configs = pbtxt.read_repository(deployment.repository)
    for name in ("embedding_lookup", "ranking_fused"):
        found = [pbtxt.parameter(configs[name], key) for key in ("refresh", "refresh_memory_bytes")]
        assert found == ["overlay", "1000000000"]
    for name in ("embedding_lookup", "hstu", "mlp_head", "ranking_fused"):
        assert pbtxt.parameter(configs[name], "refresh_poll_seconds") == "0.5"
        linked = deployment.repository / name / pbtxt.parameter(configs[name], "versions_folder")
        assert os.path.realpath(linked) == str(folder.path)
    assert not assemble(folder.model, tmp_path / "plain", Options()).versions.exists()
    shutil.rmtree(folder.path)
    with pytest.raises(ConfigError, match="is no folder; it holds the versions"):
        RefreshSettings(tables=folder.path)


@pytest.mark.parametrize(
    "wrong", [{"mode": "maybe"}, {"poll_s": 0.0}, {"poll_s": float("nan")}, {"memory_bytes": -1}], ids=str
)
def test_settings_of_refreshes_are_checked(wrong):
    with pytest.raises(ConfigError):
        RefreshSettings(**wrong)
