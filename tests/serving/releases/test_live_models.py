"""Tables and dense weights move together or not at all."""

import json
import shutil
import time

import pytest
from release_folders import DIM, AnyStep, publish, write_model, write_tables

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.table_versions import rollback_version
from hstu_trt.serving.models import live_models
from hstu_trt.serving.models.live_models import DenseNotReadyError, LiveDense, LiveFused, LiveRows
from hstu_trt.serving.models.live_stages import (
    DenseLostError,
    text_tensor,
)
from hstu_trt.serving.refresh.releases import check_published
from hstu_trt.tables.refresh import VersionOpener


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
    assert time.monotonic() - began < 60, "it waits for the whole of HELD_TIMEOUT_S"


def test_a_board_that_cannot_be_written_is_the_reason(folder, place, tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    rows = LiveRows(place, VersionOpener(), dense_is_fixed=False)
    began = time.monotonic()
    with pytest.raises(DenseNotReadyError, match=r"cannot tell whether they hold them.*make .*run/live/.* writable"):
        rows._take(folder.path / "b3")
    assert time.monotonic() - began < 60, "it waits for the whole of HELD_TIMEOUT_S"
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
