"""The events of a run folder, without a server: bounded, whole for those who follow them, and in nobody's way."""

import json
import os

from served import events_of
from waiting import eventually

from hstu_trt.serving.supervision import events


def test_bad_requests_without_end_do_not_fill_a_disk(tmp_path, monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: seconds[0])
    told = events.Events(tmp_path, "test")
    for number in range(events.MOST_REQUESTS_PER_S + 7):
        told.request(f"{number}", "INVALID_ARGUMENT", "bad")
    assert len(events_of(tmp_path)) == events.MOST_REQUESTS_PER_S
    seconds[0] += 1
    told.request("i" * 10_000, "INVALID_ARGUMENT", "m" * 10_000 + "\n")
    *_, before, last = events_of(tmp_path)
    assert "left_out_before" not in before and last["left_out_before"] == 7
    assert (len(last["request_id"]), len(last["message"])) == (128, 2000)


def test_a_full_file_makes_room_and_followers_miss_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "MOST_BYTES", 2000)
    heard = []
    follower = events.EventFollower(tmp_path, lambda line: heard.append(json.loads(line)["number"]))
    told = events.Events(tmp_path, "test")
    for number in range(40):
        told.write("test", number=number)
        eventually(lambda number=number: len(heard) > number, lambda: heard)
    follower.stop()
    assert heard == list(range(40))
    assert {path.name for path in tmp_path.iterdir()} == {events.EVENTS_FILE, f"{events.EVENTS_FILE}.1"}
    assert all(path.stat().st_size <= 2200 for path in tmp_path.iterdir())


def test_events_that_cannot_be_written_stop_nobody(tmp_path):
    events.Events(tmp_path / "nowhere", "test").write("test")
    assert not (tmp_path / "nowhere").exists()


def test_a_full_file_is_renamed_by_one_process_alone(tmp_path, monkeypatch):
    """Two find it full at the same time: what the first has begun since must not take the full one's place."""
    told, other, fstat = events.Events(tmp_path, "test"), events.Events(tmp_path, "other"), os.fstat

    def while_another_writes(descriptor):
        monkeypatch.setattr(events.os, "fstat", fstat)
        other.write("full", filling="x" * 2000)
        other.write("after")
        return fstat(descriptor)

    monkeypatch.setattr(events, "MOST_BYTES", 2000)
    monkeypatch.setattr(events.os, "fstat", while_another_writes)
    told.write("before")
    assert [line["event"] for line in events_of(tmp_path)] == ["after"]
    full = (tmp_path / f"{events.EVENTS_FILE}.1").read_text().splitlines()
    assert [json.loads(line)["event"] for line in full] == ["before", "full"]


def test_a_line_on_its_way_is_left_out(tmp_path):
    (tmp_path / events.EVENTS_FILE).write_text('{"event": "whole"}\n{"event": "ha')
    assert events_of(tmp_path) == [{"event": "whole"}]
