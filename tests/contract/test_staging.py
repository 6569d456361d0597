"""Folders that appear whole or not at all: whatever happens meanwhile, the name leads to the old one or the new one."""

import errno
import os
from pathlib import Path

import pytest

from hstu_trt.contract.staging import staged_folder


@pytest.fixture
def out(tmp_path):
    """A folder that was made before."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("old")
    return tmp_path / "out"


def make(out, text="new"):
    with staged_folder(out) as part:
        (part / "file").write_text(text)


def test_the_new_folder_takes_the_place_of_the_old_one(out):
    make(out)
    assert (out / "file").read_text() == "new"
    assert os.listdir(out.parent) == ["out"]


def test_folders_above_are_made(tmp_path):
    make(tmp_path / "a/b/out")
    assert (tmp_path / "a/b/out/file").read_text() == "new"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(out, error):
    with pytest.raises(type(error)), staged_folder(out) as part:
        (part / "file").write_text("half")
        raise error
    assert (out / "file").read_text() == "old"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "planted"), KeyboardInterrupt()])
@pytest.mark.parametrize("stopped", [1, 2])
def test_an_error_between_the_renames_leaves_what_was_there(out, monkeypatch, error, stopped):
    """Ctrl-C may come when the old folder has just been moved out of the way."""
    renames, rename = [], Path.rename

    def rename_or_stop(path, target):
        renames.append(path)
        if len(renames) == stopped:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_or_stop)
    with pytest.raises(type(error)):
        make(out)
    assert (out / "file").read_text() == "old"
    assert os.listdir(out.parent) == ["out"]


def test_what_a_killed_process_left_is_in_nobodys_way(out, monkeypatch):
    """Of the same process id: in a container each command has that."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), staged_folder(out):
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        raise KeyboardInterrupt
    assert len(os.listdir(out.parent)) == 2
    make(out)
    assert (out / "file").read_text() == "new"


def test_a_link_stays_and_what_it_leads_to_is_replaced(out, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(out)
    make(link)
    assert link.is_symlink()
    assert (out / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_a_file_in_place_of_a_folder_above_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=rf"Not a directory: '{tmp_path}/file'"):
        make(tmp_path / "file/out")
