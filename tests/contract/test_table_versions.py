"""CURRENT: readers see one whole version, and nothing is published that is damaged."""

import threading

import numpy as np
import pytest

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import read_tables, write_table, write_tables_manifest
from hstu_trt.contract.table_versions import current_tables, publish_version

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

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(40):
        publish_version(store / f"v{1 + turn % 2}", regenerate=REGENERATE)
    stop.set()
    reader.join()
    assert not failures
    assert seen == {"v1", "v2"}
