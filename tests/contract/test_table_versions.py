"""CURRENT: readers see one whole version, and nothing is published that is damaged."""

import dataclasses
import itertools
import os
import shutil
import threading

import numpy as np
import pytest
from waiting import eventually

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import write_manifest
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.model_folder import onnx_stages, write_model_folder
from hstu_trt.contract.presets import debug
from hstu_trt.contract.shards import write_shard
from hstu_trt.contract.table_format import read_tables, write_table, write_tables_manifest
from hstu_trt.contract.table_versions import current_tables, publish_version, rollback_version, version_kind
from hstu_trt.contract.tensors import default_limits

REGENERATE = "hstu-trt tables convert"


def write_version(folder, value, name=None):
    config = TableConfig(name="item", rows=5, dim=2, dtype="float32", features=("item_id",))
    table = write_table(folder, config, [np.full((5, 2), value, np.float32)])
    write_tables_manifest(folder, [table], REGENERATE, {"version": name or folder.name})
    return folder


@pytest.fixture
def store(tmp_path):
    for number in (1, 2):
        write_version(tmp_path / f"v{number}", number)
    return tmp_path


def test_the_published_version_is_in_use_and_can_be_taken_back(store):
    for version in ("v1", "v2", "v1"):
        publish_version(store / version, regenerate=REGENERATE)
        assert current_tables(store) == store / version
        assert (store / "CURRENT").read_text() == f"{version}\n"
    assert sorted(path.name for path in store.iterdir()) == ["CURRENT", "PREVIOUS", "v1", "v2"]


def test_a_model_folder_brings_its_tables(store):
    config = dataclasses.replace(debug(), tables=())
    write_version(store / "m3" / "tables", 3, "tables")
    for name in (*(f"{stage}.onnx" for stage in onnx_stages(config)), "weights.safetensors"):
        (store / "m3" / name).write_bytes(name.encode())
    facts = {"name": "m", "config": config, "limits": default_limits(config), "precision": "fp32", "made_by": "a test"}
    write_model_folder(store / "m3", **facts, facts={})
    publish_version(store / "m3", regenerate=REGENERATE)
    assert current_tables(store) == store / "m3" / "tables"
    spoil(store / "m3/tables/item/00000.safetensors")
    with pytest.raises(ArtefactError, match="does not match the sha256"):
        publish_version(store / "m3", regenerate=REGENERATE)


def test_a_delta_in_use_is_for_servers_alone(store):
    write_shard(store / "d3/item/00000.safetensors", "float32", 2, [np.zeros((1, 2), np.float32)])
    write_manifest(store / "d3", kind="tables delta", made_by="", files=["item/00000.safetensors"], facts={})
    publish_version(store / "d3", regenerate=REGENERATE)
    with pytest.raises(ArtefactError, match=r"'d3', a delta, .*tables delta apply"):
        current_tables(store)
    spoil(store / "d3/item/00000.safetensors")
    with pytest.raises(ArtefactError, match="does not match the sha256"):
        publish_version(store / "d3", regenerate=REGENERATE)


def test_the_way_back_is_to_what_was_in_use_before(store):
    with pytest.raises(ArtefactError, match=r"has no PREVIOUS; name a version with: hstu-trt tables publish"):
        rollback_version(store, regenerate=REGENERATE)
    for version in ("v1", "v2", "v2"):
        publish_version(store / version, regenerate=REGENERATE)
    for version in ("v1", "v2"):
        assert rollback_version(store, regenerate=REGENERATE) == store / version
        assert current_tables(store) == store / version
    (store / "PREVIOUS").write_text("v2\n")
    with pytest.raises(ArtefactError, match="'v2' is in use already"):
        rollback_version(store, regenerate=REGENERATE)
    (store / "PREVIOUS").write_text("v1\n")
    spoil(store / "v1/item/00000.safetensors")
    with pytest.raises(ArtefactError, match="does not match the sha256"):
        rollback_version(store, regenerate=REGENERATE)
    assert current_tables(store) == store / "v2"


BROKEN = {
    "a version that is gone": lambda store: shutil.rmtree(store / "v2"),
    "nothing": lambda store: (store / "CURRENT").write_text(""),
    "nonsense": lambda store: (store / "CURRENT").write_bytes(b"\xff../"),
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_broken_pointer_is_mended_by_publishing_or_going_back(store, damage):
    write_version(store / "v3", 3)
    for mend, used in ((lambda: publish_version(store / "v3", regenerate=""), "v3"), (lambda: back(store), "v1")):
        for version in ("v1", "v2"):
            write_version(store / version, 1)
            publish_version(store / version, regenerate=REGENERATE)
        damage(store)
        with pytest.raises(ArtefactError, match="CURRENT"):
            current_tables(store)
        mend()
        assert current_tables(store) == store / used
        assert (store / "PREVIOUS").read_text() == "v1\n", "the last that was known to be in use"


def back(store):
    rollback_version(store, regenerate=REGENERATE)


def refusal(call):
    """What a call raises, from a thread: it may wait for ever."""
    said = []

    def run():
        with pytest.raises(ArtefactError) as caught:
            call()
        said.append(str(caught.value))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(10)
    return said[0] if said else "nothing within 10 s"


def test_pipes_and_huge_files_hold_nobody_up(store):
    (store / "pipe").mkdir()
    os.mkfifo(store / "pipe/manifest.json")
    for call in (lambda: version_kind(store / "pipe"), lambda: read_tables(store / "pipe", regenerate=REGENERATE)):
        assert "is no regular file" in refusal(call)
    os.mkfifo(store / "CURRENT")
    assert "is no regular file" in refusal(lambda: current_tables(store))
    with (store / "v1/manifest.json").open("a") as stream:
        stream.truncate(1 << 40)
    assert "has more than 67108864 bytes" in refusal(lambda: version_kind(store / "v1"))


def test_only_versions_are_published(store):
    (store / "linked").symlink_to(store / "v1")
    (store / "empty").mkdir()
    write_manifest(store / "other", kind="deployment", made_by="", files=[], facts={})
    for name, says in (
        ("linked", "is a link"),
        ("empty", "is not readable: there is none"),
        ("gone", "there is no folder"),
        ("other", "holds 'deployment'"),
    ):
        with pytest.raises(ArtefactError, match=says):
            publish_version(store / name, regenerate=REGENERATE)
    assert not (store / "CURRENT").exists()


def spoil(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_tables_folder_is_its_own_version(store):
    assert current_tables(store / "v1") == store / "v1"
    assert current_tables(store / "missing") == store / "missing"


def test_a_damaged_version_is_not_published(store):
    publish_version(store / "v1", regenerate=REGENERATE)
    shard = store / "v2/item/00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtefactError, match="does not match the sha256"):
        publish_version(store / "v2", regenerate=REGENERATE)
    assert current_tables(store) == store / "v1"


def test_a_renamed_version_is_not_published(store):
    (store / "v2").rename(store / "v3")
    with pytest.raises(ArtefactError, match="holds version 'v2'"):
        publish_version(store / "v3", regenerate=REGENERATE)
    assert not (store / "CURRENT").exists()


def test_tables_cannot_hold_versions(store):
    write_version(store / "v1" / "inner", 3)
    with pytest.raises(ArtefactError, match="cannot hold versions"):
        publish_version(store / "v1" / "inner", regenerate=REGENERATE)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"../v1", b"/etc", b"v1/item", b"v9\n", b"v1\nv2", b"\xff\xfe", b"x" * 10_000, b"v1\0", b".", b" v1"],
    ids=repr,
)
def test_a_strange_pointer_is_refused(store, content):
    (store / "CURRENT").write_bytes(content)
    with pytest.raises(ArtefactError, match="CURRENT"):
        current_tables(store)


def test_a_pointer_to_a_link_is_refused(store):
    (store / "v3").symlink_to(store / "v1")
    (store / "CURRENT").write_text("v3\n")
    with pytest.raises(ArtefactError, match="names 'v3'"):
        current_tables(store)


def test_readers_always_see_a_whole_version(store):
    publish_version(store / "v1", regenerate=REGENERATE)
    stop, seen, failures = threading.Event(), set(), []

    def read():
        while not stop.is_set():
            try:
                folder = current_tables(store)
                read_tables(folder, regenerate=REGENERATE)
                seen.add(folder.name)
            except ArtefactError as error:
                failures.append(error)

    turns = itertools.count()

    def publish():
        publish_version(store / f"v{1 + next(turns) % 2}", regenerate=REGENERATE)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(40):
            publish()
        eventually(lambda: publish() or seen == {"v1", "v2"}, lambda: seen)  # a busy machine lets the reader wait
    finally:
        stop.set()
        reader.join()
    assert not failures
