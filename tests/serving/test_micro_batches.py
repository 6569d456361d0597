"""Packing of waiting requests while batches are on their way, on a scorer whose batches end when the test says so."""

import threading

import numpy as np
import pytest

from hstu_trt.engines.cuda.packing import Size
from hstu_trt.serving.models.micro_batches import BatchLimits, ClosedError, FullError, MicroBatches

LIMITS = BatchLimits(tokens=10, users=3, places=5, in_flight=2)
WAIT_S = 30


class GatedScorer:
    """Scores are the users' own numbers; a batch ends when ``go`` is released, ``started`` tells of each."""

    depth = 3

    def __init__(self, *, gated=True):
        self.go, self.started, self.batches = threading.Semaphore(0 if gated else 10**6), threading.Semaphore(0), []

    def size_of(self, user):
        return Size(user["tokens"] - 1, 1)

    def submit(self, users, *, alone=False):
        self.batches.append(([user["id"] for user in users], alone))
        self.started.release()
        if any(user["id"] == "unsubmittable" for user in users):
            raise RuntimeError("no room")
        return users

    def collect(self, users):
        assert self.go.acquire(timeout=WAIT_S)
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
    for n in range(2):  # both are on their way before anything else comes
        batches.put([user(n)], answers.of(n))
        assert scorer.started.acquire(timeout=WAIT_S)
    for n in range(2, 7):
        batches.put([user(n)], answers.of(n))
    assert [ids for ids, _ in scorer.batches] == [[0], [1]], "a third batch is on its way beside two"
    scorer.go.release(100)
    answers.wait(7)
    assert answers.found == {n: [n] for n in range(7)}
    assert [ids for ids, _ in scorer.batches] == [[0], [1], [2, 3], [4, 5], [6]]
    assert scorer.batches[0][1] and not scorer.batches[1][1], "only what has nothing beside it is alone"


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
    one_at_a_time.put([user("a")], answers.of("a"))
    assert scorer.started.acquire(timeout=WAIT_S)
    one_at_a_time.put([user(name, count) for name, count in zip("bcde", tokens, strict=True)], answers.of("rest"))
    scorer.go.release(100)
    answers.wait(2)
    assert [ids for ids, _ in scorer.batches[1:]] == expected
    assert answers.found["rest"] == list("bcde"), "scores come back in the order of the users"
    one_at_a_time.close()


@pytest.mark.parametrize("culprit", ["poison", "unsubmittable"])
def test_a_batch_that_fails_fails_its_own_requests_once(scorer, batches, culprit):
    answers = Answers()
    for n in range(2):
        batches.put([user(n)], answers.of(n))
        assert scorer.started.acquire(timeout=WAIT_S)
    batches.put([user(culprit), user("mate"), user("in the next batch")], answers.of("bad"))
    batches.put([user("good")], answers.of("good"))
    scorer.go.release(100)
    answers.wait(4)
    assert isinstance(answers.found.pop("bad"), RuntimeError)
    assert answers.found == {0: [0], 1: [1], "good": ["good"]}


def fly(scorer, batches, answers, names):
    """Puts requests in that start at once."""
    for name in names:
        batches.put([user(name)], answers.of(name))
        assert scorer.started.acquire(timeout=WAIT_S)


def test_what_finds_no_place_is_refused_at_once(scorer, batches):
    answers = Answers()
    fly(scorer, batches, answers, range(2))
    for n in range(2, 7):
        batches.put([user(n, 100)], answers.of(n))  # five wait now, as many as may, whatever their tokens
    with pytest.raises(FullError, match="5 requests wait already"):
        batches.require_place()
    with pytest.raises(FullError, match="5 requests wait already"):
        batches.put([user("late")], answers.of("late"))
    counts = batches.take_counts()
    assert (counts.shed, counts.waiting) == (2, 5)
    scorer.go.release(1)
    assert scorer.started.acquire(timeout=WAIT_S)  # the oldest has given its place away
    batches.put([user("later")], answers.of("later"))
    scorer.go.release(100)
    answers.wait(8)
    assert answers.found == {n: [n] for n in [*range(7), "later"]}
    counts = batches.take_counts()
    assert (counts.shed, counts.waiting) == (0, 0)


def test_a_request_keeps_its_place_until_its_last_user_begins(scorer):
    one_at_a_time, answers = MicroBatches(scorer, BatchLimits(tokens=10, users=2, places=1, in_flight=1)), Answers()
    fly(scorer, one_at_a_time, answers, ["first"])
    one_at_a_time.put([user(n) for n in range(3)], answers.of("three"))
    scorer.go.release()
    assert scorer.started.acquire(timeout=WAIT_S)  # two of the three
    with pytest.raises(FullError):
        one_at_a_time.put([user("early")], answers.of("early"))
    scorer.go.release()
    assert scorer.started.acquire(timeout=WAIT_S)
    one_at_a_time.put([user("next")], answers.of("next"))
    scorer.go.release(100)
    one_at_a_time.close()
    assert answers.found == {"first": ["first"], "three": [0, 1, 2], "next": ["next"]}
    assert one_at_a_time.take_counts().shed == 1


def test_closing_answers_what_waits_and_refuses_what_comes(scorer):
    made, answers = MicroBatches(scorer, LIMITS), Answers()
    for n in range(5):
        made.put([user(n)], answers.of(n))
    scorer.go.release(100)
    made.close()
    assert sorted(answers.found) == list(range(5))
    with pytest.raises(ClosedError):
        made.put([user("late")], answers.of("late"))


@pytest.mark.parametrize("culprit", [0, "poison", "unsubmittable"])
def test_counts_add_up(scorer, batches, culprit):
    """Batches that fail are counted, too."""
    answers = Answers()
    fly(scorer, batches, answers, ["a", "b"])
    for name in (culprit, 1, 2, 3):
        batches.put([user(name)], answers.of(name))
    scorer.go.release(100)
    answers.wait(6)
    counts = batches.take_counts()
    assert sum(users * number for users, number in counts.batches.items()) == 6 and counts.tokens == 24
    assert counts.batches.keys() == counts.batch_s.keys() and all(s > 0 for s in counts.batch_s.values())
    assert counts.waited_s > 0 and counts.waiting == 0
    assert batches.take_counts().tokens == 0
