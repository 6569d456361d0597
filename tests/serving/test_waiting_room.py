"""The bounded queue in front of a model, and the pipe that tells the first step how far the second one is."""

import threading
import time

import pytest

from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving.models import handover
from hstu_trt.serving.models.handover import ENOUGH_AHEAD, MOST_AHEAD, Handover, Turns
from hstu_trt.serving.models.waiting_room import WaitingRoom, queue_places


class Gated:
    """Work that waits until it is let go."""

    def __init__(self):
        self.batches, self.begun, self.go = [], threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, items):
        self.batches.append(items)
        self.begun.release()
        assert self.go.acquire(timeout=10)


@pytest.mark.parametrize("places", [1, 3])
def test_what_finds_no_place_is_refused_at_once_and_the_rest_is_served_in_order(places):
    work = Gated()
    room = WaitingRoom(work, places=places)
    assert list(room.offer(["first"])) == []
    assert work.begun.acquire(timeout=10)  # being worked on: it holds no place any more
    waiting = [f"w{n}" for n in range(places)]
    assert list(room.offer([*waiting, "late", "later"])) == ["late", "later"] and room.waiting == places
    assert list(room.offer(["much later"])) == ["much later"]
    for _ in range(places + 1):
        work.go.release()
    room.close()
    assert work.batches == [["first"], *([item] for item in waiting)]
    counts = room.tally.take(room.waiting)
    assert counts.shed == 3 and counts.waiting == 0 and counts.waited_s > 0
    assert counts.begun == places + 1
    assert room.tally.take(0).shed == 0


def test_what_gathers_is_worked_on_together_up_to_a_batch():
    work = Gated()
    room = WaitingRoom(work, places=8, most_at_once=3)
    room.offer([0])
    assert work.begun.acquire(timeout=10)
    room.offer([1, 2, 3, 4])
    for _ in range(3):
        work.go.release()
    room.close()
    assert work.batches == [[0], [1, 2, 3], [4]]


def test_idle_means_that_nothing_waits_or_runs():
    work = Gated()
    room = WaitingRoom(work, places=2)
    assert room.is_idle
    room.offer(["x"])
    assert not room.is_idle
    began = time.monotonic()
    room.linger(0.05)
    assert time.monotonic() - began >= 0.05
    work.go.release()
    room.linger(10)
    assert room.is_idle and time.monotonic() - began < 10
    room.close()


def test_items_keep_their_places_while_there_is_no_room_further_on():
    room_further_on, work = threading.Event(), Gated()
    room = WaitingRoom(work, places=2, before=lambda: room_further_on.wait(10))
    assert list(room.offer([1, 2, 3])) == [3]
    assert room.waiting == 2 and not work.batches
    room_further_on.set()
    work.go.release(2)
    room.close()
    assert work.batches == [[1], [2]]


def test_a_tally_adds_up_batches_by_users():
    room = WaitingRoom(lambda items: None, places=1)
    for users, tokens in ((2, 10), (2, 30), (5, 7)):
        room.tally.batch(users=users, tokens=tokens, seconds=0.5)
    counts = room.tally.take(0)
    assert counts.batches == {2: 2, 5: 1} and counts.batch_s == {2: 1.0, 5: 0.5} and counts.tokens == 47
    room.close()


@pytest.mark.parametrize("text", ["0", "-1", "", "1.5", "many", "²"])
def test_a_queue_needs_a_bound(text):
    with pytest.raises(ConfigError, match="requests may wait"):
        queue_places(text)
    assert queue_places("16") == 16


@pytest.fixture
def sides(tmp_path):
    lookup, hstu = Handover(tmp_path / "live"), Turns(tmp_path / "live")
    yield lookup, hstu
    hstu.close()
    lookup.close()


def test_the_first_step_stays_so_far_ahead_and_no_further(sides):
    lookup, hstu = sides
    for _ in range(MOST_AHEAD):
        assert lookup.has_room
        lookup.sent()
    assert not lookup.has_room
    with hstu.turn(1):
        assert lookup.has_room  # one has been begun


def test_waiting_ends_when_enough_have_been_begun(sides):
    lookup, hstu = sides
    with hstu.turn(1):  # at work: what waits behind it is late, not lost
        assert lookup.has_room
        for _ in range(MOST_AHEAD):
            lookup.sent()
        waiter = threading.Thread(target=lookup.wait_for_room, daemon=True)
        waiter.start()
        waiter.join(10 * handover.LOST_S)
        assert waiter.is_alive()
        with hstu.turn(MOST_AHEAD - ENOUGH_AHEAD):
            waiter.join(10)
        assert not waiter.is_alive()


def test_requests_that_got_lost_on_the_way_block_nobody_for_long(sides):
    lookup, _ = sides
    for _ in range(MOST_AHEAD):
        lookup.sent()
    waiter = threading.Thread(target=lookup.wait_for_room, daemon=True)
    waiter.start()
    waiter.join(10)
    assert not waiter.is_alive() and lookup.has_room


def test_more_turns_than_were_sent_do_not_let_more_through(sides):
    lookup, hstu = sides
    for _ in range(20):  # straight to hstu
        with hstu.turn(1):
            pass
    for _ in range(MOST_AHEAD):
        assert lookup.has_room
        lookup.sent()
    assert not lookup.has_room


def test_nobody_who_reads_is_no_trouble(tmp_path):
    hstu = Turns(tmp_path)
    for _ in range(100):
        with hstu.turn(1000):
            pass
    hstu.close()


def test_the_pipe_goes_with_the_server(tmp_path):
    lookup = Handover(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    lookup.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Handover(tmp_path / "file" / "live")
