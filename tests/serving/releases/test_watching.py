"""What is published is taken once, what is refused is told once, and the board tells who holds what."""

import time
from types import SimpleNamespace

import pytest
from release_folders import publish

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.table_versions import rollback_version
from hstu_trt.serving.models.held import Board
from hstu_trt.serving.models.live_models import DenseNotReadyError
from hstu_trt.serving.refresh import watching
from hstu_trt.serving.refresh.watching import Watcher
from hstu_trt.tables.remote_resp import RemoteError


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


def test_tries_become_rare(folder, monkeypatch):
    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=lambda: 1000.0))

    def take(version):
        raise OSError("disk")

    told = Told(folder, take)
    publish(folder, "v1")
    delays = []
    for _ in range(40):
        told.poll()
        delays.append(told.watcher._retry_at - 1000.0)
        told.watcher._retry_at = 0
    assert delays == sorted(delays)
    assert 0 < delays[0] < 1 and delays[-1] == 300
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
