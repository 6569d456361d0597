"""Manifests: a folder that is incomplete, damaged or foreign is refused, with the command that makes it again."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import json_digest, read_manifest, write_manifest, write_text_atomically

REGENERATE = "make onnx MODEL=planted"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.bin").write_bytes(b"abc")
    write_manifest(tmp_path, kind="planted", made_by=REGENERATE, files=["sub/a.bin"], facts={"answer": 42})
    return tmp_path


def read(folder, **options):
    return read_manifest(folder, **{"kind": "planted", "regenerate": REGENERATE, **options})


def test_a_folder_is_read_back(folder):
    document = read(folder)
    assert document["answer"] == 42
    assert document["made_by"] == REGENERATE
    assert document["files"]["sub/a.bin"]["bytes"] == 3


def overwrite(content):
    return lambda folder: (folder / "manifest.json").write_bytes(content)


def edit(**changes):
    def change(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


REFUSED = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no planted"),
    "half a manifest": (overwrite(b'{"schema": 1'), "is not readable JSON"),
    "not text": (overwrite(b"\xff\xfe"), "is not readable JSON"),
    "a list": (overwrite(b"[1]"), "describes 'list', not 'planted'"),
    "another kind": (edit(kind="tables"), "describes 'tables', not 'planted' of schema 1"),
    "another schema": (edit(schema=2), "not 'planted' of schema 1"),
    "a file is gone": (lambda f: (f / "sub/a.bin").unlink(), "a.bin is missing"),
    "a file is a folder": (edit(files={"sub": {"bytes": 0, "sha256": ""}}), "sub is missing"),
    "another size": (lambda f: (f / "sub/a.bin").write_bytes(b"ab"), "has 2 bytes, its manifest says 3"),
    "flipped": (lambda f: (f / "sub/a.bin").write_bytes(b"abd"), "does not match the sha256"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_folder_is_refused_with_its_remedy(folder, change, message):
    change(folder)
    with pytest.raises(ArtefactError, match=f"{message}.*make it again with: {REGENERATE}"):
        read(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match=f"holds no planted .*{REGENERATE}"):
        read(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../a.bin", "/etc/hostname", "sub/../../a.bin"])
def test_a_file_outside_the_folder_is_refused(folder, name):
    edit(files={name: {"bytes": 3, "sha256": ""}})(folder)
    with pytest.raises(ArtefactError, match="names a file outside its folder"):
        read(folder, verify=False)


def test_sizes_are_checked_without_verifying_and_digests_are_not(folder):
    (folder / "sub/a.bin").write_bytes(b"abd")
    read(folder, verify=False)
    (folder / "sub/a.bin").write_bytes(b"abcd")
    with pytest.raises(ArtefactError, match="has 4 bytes"):
        read(folder, verify=False)


documents = st.dictionaries(st.text(max_size=5), st.integers() | st.lists(st.integers()), max_size=5)


@given(documents)
def test_a_digest_does_not_depend_on_key_order(document):
    assert json_digest(dict(reversed(document.items()))) == json_digest(document)


@given(documents, documents)
def test_digests_tell_documents_apart(one, other):
    assert (json_digest(one) == json_digest(other)) == (one == other)


def test_a_text_is_replaced_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "new/a.txt"
    write_text_atomically(path, "one")
    write_text_atomically(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]
