"""A start that finds a version in use that it cannot serve: it ends, or the version before it is served, whole."""

import dataclasses
import json
import re
import shutil

import pytest
from release_folders import AnyStep, publish, write_model, write_tables

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.table_versions import CURRENT_NAME, PREVIOUS_NAME
from hstu_trt.serving.models import live_models
from hstu_trt.serving.models.live_models import LiveDense, LiveFused, LiveRows, serves
from hstu_trt.serving.models.live_stages import text_tensor
from hstu_trt.serving.refresh.releases import check_published
from hstu_trt.tables.refresh import VersionOpener


@pytest.fixture
def lenient(folder, place, monkeypatch):
    """The folder of a deployment whose start may fall back; v1, then v4 of other dense weights, were published."""
    monkeypatch.setattr(live_models, "warm", lambda stage, spec: None)
    place.folder = dataclasses.replace(folder, or_previous=True)
    publish(folder, "v1")
    publish(folder, "v4")
    return place.folder


def open_rows(place):
    return LiveRows(place, VersionOpener(), dense_is_fixed=False)


def flip_a_byte(folder, name="v4"):
    shard = next((folder.path / name).glob("**/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


# What becomes of the version in use; how it is called then, and what is told of it.
BAD = {
    "a flipped byte": (flip_a_byte, "v4", "sha256"),
    "gone": (lambda folder: shutil.rmtree(folder.path / "v4"), "CURRENT", "is no folder"),
    "no dense weights": (lambda folder: shutil.rmtree(folder.path / "b3"), "v4", "0 model folders"),
    "nonsense": (lambda folder: (folder.path / CURRENT_NAME).write_bytes(b"\xff../"), "CURRENT", "not readable"),
    "no manifest": (lambda folder: (folder.path / "v4/manifest.json").unlink(), "v4", "manifest.json"),
}


@pytest.mark.parametrize(("damage", "name", "why"), BAD.values(), ids=BAD)
def test_the_version_before_is_served_where_that_is_wanted(lenient, place, damage, name, why):
    damage(lenient)
    told = []
    place.tell = told.append
    rows = open_rows(place)
    first = rows.live.current
    assert (first.tables.name, first.instead_of) == ("v1", name)
    assert first.dense.pair_id == first.tables.folder.pair_id == "A"
    rows.watcher.start()
    rows.watcher.stop()
    assert [(refresh.version, bool(re.search(why, refresh.refused))) for refresh in told] == [(name, True)]
    board = json.loads((place.board.folder / "embedding_lookup.json").read_text())
    assert board["instead_of"] == board["refused"]["version"] == name
    assert board["tables_version"].startswith("v1@")


@pytest.mark.parametrize(("damage", "name", "why"), BAD.values(), ids=BAD)
def test_without_that_a_start_ends(lenient, place, folder, damage, name, why):
    damage(lenient)
    place.folder = folder
    with pytest.raises(ArtefactError, match=f"(?s)cannot be served: .*{why}.*hstu-trt tables rollback"):
        open_rows(place)


def test_the_next_version_ends_it(lenient, place):
    flip_a_byte(lenient)
    rows = open_rows(place)
    write_tables(lenient.path / "v5", 6, "A")
    publish(lenient, "v5")
    rows.watcher.poll()
    assert (rows.live.current.tables.name, serves(rows.live.current)["instead_of"]) == ("v5", None)
    assert (lenient.path / PREVIOUS_NAME).read_text() == "v4\n"


def test_a_sound_version_in_use_is_served_whatever_stood_before(lenient, place):
    flip_a_byte(lenient, "v1")
    rows = open_rows(place)
    assert (rows.live.current.tables.name, rows.live.current.instead_of, rows.watcher.passed_over) == ("v4", None, None)
    assert rows.live.current.dense.pair_id == "B"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda folder: flip_a_byte(folder, "v1"), "sha256"),
        (lambda folder: (folder.path / PREVIOUS_NAME).unlink(), "PREVIOUS is not readable"),
        (lambda folder: write_tables(folder.path / "v1", 2, "C"), "belongs to the dense weights C"),
    ],
    ids=["damaged", "none", "of dense weights that are not there"],
)
def test_two_bad_versions_end_a_start(lenient, place, spoil, why):
    """Nor is any other folder taken, however sound: nobody may ever have meant it to be served."""
    write_tables(lenient.path / "v0", 1, "A")
    flip_a_byte(lenient)
    spoil(lenient)
    with pytest.raises(ArtefactError, match=f"(?s)v4.*nor can the version before it: .*{why}"):
        open_rows(place)


def test_steps_answer_for_the_version_before(lenient, place):
    """The tables in use are bad, their dense weights are not: a request still gets those that its rows belong to."""
    for name in ("c1", "c2"):
        write_model(lenient.path / name, 1, name)
        publish(lenient, name)
    flip_a_byte(lenient, "c2/tables")
    digest = read_model_folder(lenient.path / "c1").digest
    assert open_rows(place).live.current.dense.digest == digest
    place.name = "hstu"
    opened = []
    dense = LiveDense(place, lambda model, step: opened.append(model.pair_id) or AnyStep())
    dense.stages.infer({"dense_id": text_tensor(digest)})
    assert opened[-1] == "c1"
    place.name = "ranking_fused"
    fused = LiveFused(place, VersionOpener(), lambda model, step: AnyStep())
    assert (fused.live.current.dense.digest, fused.live.current.instead_of) == (digest, "c2")
    assert fused.live.current.steps is not None


def test_serve_says_so_before_the_launch(lenient):
    shutil.rmtree(lenient.path / "b3")
    told = []
    assert check_published(lenient, tell=told.append) == lenient.path / "v1"
    assert len(told) == 1
    assert told[0].startswith("v4 cannot be served, v1 before it is: ")
    publish(lenient, "v1")
    assert check_published(lenient, tell=told.append) == lenient.path / "v1"
    assert len(told) == 1
