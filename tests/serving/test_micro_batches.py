"""Packing of waiting requests while batches are on their way, on a scorer whose batches end when the test says so."""

import threading

import numpy as np
import pytest

from hstu_trt.contract.errors import InputError
from hstu_trt.engines.cuda.packing import Size
from hstu_trt.serving.models.micro_batches import BatchLimits, ClosedError, FullError, MicroBatches

LIMITS = BatchLimits(tokens=10, users=3, places=5, in_flight=2)
WAIT_S = 30


class GatedScorer:
    """Scores are the users' own numbers; a batch ends when ``go`` is released, ``started`` tells of each.

    The scores of a batch that is alone are there at once.
    """

    depth = 3

    def __init__(self, *, gated=True):
        self.go, self.started, self.batches = threading.Semaphore(0 if gated else 10**6), threading.Semaphore(0), []
        self.captures, self.captured = 0, threading.Semaphore(0)

    def size_of(self, user):
        return Size(user["tokens"] - 1, 1)

    def submit(self, users, *, alone=False):
        self.batches.append(([user["id"] for user in users], alone))
        self.started.release()
        if any(user["id"] == "unsubmittable" for user in users):
            raise RuntimeError("no room")
        return users, alone

    def capture_next(self):
        self.captures += 1
        self.captured.release()
        raise RuntimeError("no memory for a graph")  # which must harm nobody

    def collect(self, ticket):
        users, alone = ticket
        assert alone or self.go.acquire(timeout=WAIT_S)
        if any(user["id"] == "poison" for user in users):
            raise RuntimeError("poisoned")
        return [np.asarray([user["id"]]) for user in users]


class Answers:
    """What requests got, by name."""

    def __init__(self):
        self.found, self._came = {}, threading.Semaphore(0)

    def of(self, name):
        def answer(result):
            assert name not in self.found, f"{name} was answered twice"
            self.found[name] = result if isinstance(result, Exception) else [part.item() for part in result]
            self._came.release()

        return answer

    def wait(self, count):
        for _ in range(count):
            assert self._came.acquire(timeout=WAIT_S)


def user(identity, tokens=4):
    return {"id": identity, "tokens": tokens}


def put(batches, users, answer):
    batches.put(lambda: users, answer)


@pytest.fixture
def scorer():
    return GatedScorer()


@pytest.fixture
def batches(scorer):
    made = MicroBatches(scorer, LIMITS)
    yield made
    scorer.go.release(1000)
    made.close()


def test_what_waits_becomes_the_next_batch(scorer, batches):
    answers = Answers()
    fly(scorer, batches, answers, range(2))
    for n in range(2, 7):
        put(batches, [user(n)], answers.of(n))
    assert [ids for ids, _ in scorer.batches] == [[0, 0], [1, 1]], "a third batch is on its way beside two"
    scorer.go.release(100)
    answers.wait(7)
    assert answers.found == {0: [0, 0], 1: [1, 1], **{n: [n] for n in range(2, 7)}}
    assert [ids for ids, _ in scorer.batches] == [[0, 0], [1, 1], [2, 3], [4, 5], [6]]


def test_only_what_has_nothing_beside_it_is_alone(scorer, batches):
    answers = Answers()
    put(batches, [user("alone")], answers.of("alone"))
    answers.wait(1)
    fly(scorer, batches, answers, ["pair"])
    put(batches, [user("beside")], answers.of("beside"))
    scorer.go.release(100)
    answers.wait(2)
    assert [alone for _, alone in scorer.batches] == [True, False, False]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        pytest.param([1, 1, 1, 1], [["b", "c", "d"], ["e"]], id="users"),
        pytest.param([9, 1, 5, 5], [["b", "c"], ["d", "e"]], id="tokens"),
        pytest.param([3, 19, 3, 3], [["b"], ["c"], ["d", "e"]], id="one that is larger than a batch"),
    ],
)
def test_full_batches(scorer, tokens, expected):
    one_at_a_time = MicroBatches(scorer, BatchLimits(tokens=10, users=3, places=1, in_flight=1))
    answers = Answers()
    fly(scorer, one_at_a_time, answers, "a")
    put(one_at_a_time, [user(name, count) for name, count in zip("bcde", tokens, strict=True)], answers.of("rest"))
    scorer.go.release(100)
    answers.wait(2)
    assert [ids for ids, _ in scorer.batches[1:]] == expected
    assert answers.found["rest"] == list("bcde"), "scores come back in the order of the users"
    one_at_a_time.close()


@pytest.mark.parametrize("culprit", ["poison", "unsubmittable"])
def test_a_batch_that_fails_fails_its_own_requests_once(scorer, batches, culprit):
    answers = Answers()
    fly(scorer, batches, answers, range(2))
    put(batches, [user(culprit), user("mate"), user("in the next batch")], answers.of("bad"))
    put(batches, [user("good")], answers.of("good"))
    scorer.go.release(100)
    answers.wait(4)
    assert isinstance(answers.found.pop("bad"), RuntimeError)
    assert answers.found == {0: [0, 0], 1: [1, 1], "good": ["good"]}


def test_a_request_that_cannot_be_read_fails_alone(scorer, batches):
    answers = Answers()
    fly(scorer, batches, answers, range(2))

    def unreadable():
        raise InputError("an id outside its table")

    batches.put(unreadable, answers.of("bad"))
    put(batches, [user("good")], answers.of("good"))
    scorer.go.release(100)
    answers.wait(4)
    assert isinstance(answers.found.pop("bad"), InputError)
    assert answers.found == {0: [0, 0], 1: [1, 1], "good": ["good"]}
    assert batches.take_counts().waiting == 0


def fly(scorer, batches, answers, names):
    """Puts requests of two users in, whose batches start at once."""
    for name in names:
        put(batches, [user(name), user(name)], answers.of(name))
        assert scorer.started.acquire(timeout=WAIT_S)


def test_what_finds_no_place_is_refused_at_once(scorer, batches):
    answers = Answers()
    fly(scorer, batches, answers, range(2))
    for n in range(2, 7):
        put(batches, [user(n, 100)], answers.of(n))  # five wait now, as many as may, whatever their tokens
    with pytest.raises(FullError, match="5 requests wait already"):
        put(batches, [user("late")], answers.of("late"))
    counts = batches.take_counts()
    assert (counts.shed, counts.waiting) == (1, 5)
    scorer.go.release(1)
    assert scorer.started.acquire(timeout=WAIT_S)  # the oldest has given its place away
    put(batches, [user("later")], answers.of("later"))
    scorer.go.release(100)
    answers.wait(8)
    assert answers.found == {0: [0, 0], 1: [1, 1], **{n: [n] for n in [*range(2, 7), "later"]}}
    counts = batches.take_counts()
    assert (counts.shed, counts.waiting) == (0, 0)


def test_a_request_keeps_its_place_until_its_last_user_begins(scorer):
    one_at_a_time, answers = MicroBatches(scorer, BatchLimits(tokens=10, users=2, places=1, in_flight=1)), Answers()
    fly(scorer, one_at_a_time, answers, ["first"])
    put(one_at_a_time, [user(n) for n in range(3)], answers.of("three"))
    scorer.go.release()
    assert scorer.started.acquire(timeout=WAIT_S)  # two of the three
    with pytest.raises(FullError):
        put(one_at_a_time, [user("early")], answers.of("early"))
    scorer.go.release()
    assert scorer.started.acquire(timeout=WAIT_S)
    put(one_at_a_time, [user("next")], answers.of("next"))
    scorer.go.release(100)
    one_at_a_time.close()
    assert answers.found == {"first": ["first", "first"], "three": [0, 1, 2], "next": ["next"]}
    assert one_at_a_time.take_counts().shed == 1


def test_closing_answers_what_waits_and_refuses_what_comes(scorer):
    made, answers = MicroBatches(scorer, LIMITS), Answers()
    for n in range(5):
        put(made, [user(n)], answers.of(n))
    scorer.go.release(100)
    made.close()
    assert sorted(answers.found) == list(range(5))
    with pytest.raises(ClosedError):
        put(made, [user("late")], answers.of("late"))


@pytest.mark.parametrize("culprit", [0, "poison", "unsubmittable"])
def test_counts_add_up(scorer, batches, culprit):
    """Batches that fail are counted, too."""
    answers = Answers()
    fly(scorer, batches, answers, ["a", "b"])
    for name in (culprit, 1, 2, 3):
        put(batches, [user(name)], answers.of(name))
    scorer.go.release(100)
    answers.wait(6)
    counts = batches.take_counts()
    assert sum(users * number for users, number in counts.batches.items()) == 8 and counts.tokens == 32
    assert counts.batches.keys() == counts.batch_s.keys() and all(s > 0 for s in counts.batch_s.values())
    assert counts.waited_s > 0 and counts.waiting == 0
    assert batches.take_counts().tokens == 0


def test_graphs_are_captured_while_nobody_waits(scorer, batches):
    answers = Answers()
    for n in range(2):
        put(batches, [user(n)] * (n + 1), answers.of(n))
        assert scorer.captured.acquire(timeout=WAIT_S)
    scorer.go.release(2)
    answers.wait(2)
    assert scorer.captures == 2


def test_under_load_captures_are_rare(scorer, monkeypatch):
    """Many short batches one behind the other, with others waiting all the time: a capture for the first of them."""
    monkeypatch.setattr("hstu_trt.serving.models.micro_batches._CAPTURE_EVERY_S", 1e6)
    scorer.go.release(1000)
    limits = BatchLimits(tokens=4, users=1, places=50, in_flight=1)
    submit, together = scorer.submit, threading.Event()

    def held(users, *, alone=False):
        assert together.wait(WAIT_S)
        return submit(users, alone=alone)

    scorer.submit = held
    made, answers = MicroBatches(scorer, limits), Answers()
    for n in range(40):
        put(made, [user(n)], answers.of(n))
    together.set()
    answers.wait(40)
    made.close()
    assert len(scorer.batches) == 40
    assert 1 <= scorer.captures <= 2  # once at first, once when the last had nobody behind it
