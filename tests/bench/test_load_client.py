"""The load client on targets whose latency is known: schedules, coordinated omission, flags."""

import threading
import time
from concurrent.futures import Future

import numpy as np
import pytest
from waiting import holds_eventually

from hstu_trt.bench.load.client import ClosedLoop, OpenLoop, Records, drive, merge, poisson
from hstu_trt.bench.load.stats import BEHIND, ERRORS, SATURATED, SHORT, UNSTABLE, Repeated, queue_grows, summarise
from hstu_trt.bench.load.target import CallableTarget
from hstu_trt.bench.serving.overload import answered
from hstu_trt.contract.errors import HstuTrtError

REQUESTS = [{"n": np.array([number])} for number in range(5)]


def sleeper(seconds):
    return CallableTarget(lambda request: time.sleep(seconds) or request["n"])


def open_loop(rate, count):
    return OpenLoop(offsets_s=np.arange(count) / rate, most_waiting=1000)


def test_poisson_has_the_rate_and_is_seeded():
    moments = poisson(200.0, 50.0, seed=1)
    gaps = np.diff(moments)
    assert len(moments) == 10_000 and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05) and gaps.std() == pytest.approx(1 / 200, rel=0.05)
    assert (moments == poisson(200.0, 50.0, seed=1)).all() and (moments != poisson(200.0, 50.0, seed=2)).any()


def test_an_open_loop_keeps_its_schedule_and_cycles():
    records = drive(sleeper(0.0), REQUESTS, open_loop(200, 12))
    assert records.which.tolist() == [n % 5 for n in range(12)] and not records.errors
    assert np.diff(records.due) == pytest.approx(np.full(11, 0.005))
    assert (records.sent >= records.due).all() and (records.done >= records.sent).all()


def test_latency_counts_from_when_a_request_was_due():
    """One worker of 20 ms at 200/s: the n-th answer is due later and later, though each takes 20 ms once sent."""

    def check():
        records = drive(sleeper(0.02), REQUESTS, open_loop(200, 10))
        result = summarise(records, requested_per_s=200)
        assert result.latency_ms["max"] >= 10 * 20 - 9 * 5
        assert result.per_s == pytest.approx(50, rel=0.3)

    holds_eventually(check)  # a busy machine stretches sleeps


class Stalling:
    """Blocks the sender itself for a moment at its third request: a client that cannot keep up."""

    def __init__(self, stall_s):
        self.stall_s, self.sent = stall_s, 0

    def submit(self, request):
        self.sent += 1
        if self.sent == 3:
            time.sleep(self.stall_s)
        answer = Future()
        answer.set_result(request)
        return answer


def test_a_stalled_client_lengthens_latencies_and_is_flagged():
    result = summarise(drive(Stalling(0.2), REQUESTS, open_loop(100, 20)), requested_per_s=100)
    assert result.latency_ms["max"] >= 190 and SATURATED in result.flags
    assert result.latency_ms["p50"] > 10  # those that were due during the stall count it


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_closed_loop_keeps_so_many_in_flight(in_flight):
    lock, seen, most = threading.Lock(), [0], [0]

    def call(request):
        with lock:
            seen[0] += 1
            most[0] = max(most[0], seen[0])
        time.sleep(0.02)
        with lock:
            seen[0] -= 1
        return request["n"]

    target = CallableTarget(call, workers=8)
    records = drive(target, REQUESTS, ClosedLoop(in_flight=in_flight, requests=24))
    assert len(records) == 24 and most[0] == in_flight
    assert summarise(records).requested_per_s is None
    target.close()


def test_a_closed_loop_ends_by_time():
    began = time.perf_counter()
    records = drive(sleeper(0.005), REQUESTS, ClosedLoop(in_flight=2, seconds=0.1))
    assert 0.09 < time.perf_counter() - began < 10 and len(records) >= 3


def test_an_overloaded_target_ends_the_run():
    loop = OpenLoop(offsets_s=np.arange(1000) / 1000, most_waiting=10)
    records = drive(sleeper(0.01), REQUESTS, loop)
    assert records.cut_short and len(records) < 200
    assert UNSTABLE in summarise(records, requested_per_s=1000).flags


def test_failures_are_counted_by_what_they_say():
    def call(request):
        if request["n"][0] == 2:
            raise ValueError("planted\nsecond line")
        return request["n"]

    result = summarise(drive(CallableTarget(call), REQUESTS, ClosedLoop(in_flight=1, requests=10)))
    assert result.errors == {"ValueError('planted\\nsecond line')": 2} and ERRORS in result.flags
    assert result.per_s * result.seconds == pytest.approx(8)


def made(latency_s, *, rate=100.0, count=2000, lag_s=0.0, errors=None):
    due = np.arange(count) / rate
    latency = np.broadcast_to(latency_s, count)
    return Records(
        due=due, sent=due + lag_s, done=due + latency, which=np.zeros(count, int), errors=errors or {}, cpu_s=1.0
    )  # fmt: skip


FLAGS = {
    "good": (made(0.005), set()),
    "short": (made(0.005, count=500), {SHORT}),
    "late": (made(0.012, lag_s=0.004), {SATURATED}),
    "late, but the server is slower": (made(0.1, lag_s=0.004), set()),
    "growing": (made(np.linspace(0.005, 5.0, 2000)), {UNSTABLE}),
    "full, but steady": (made(2.0), set()),
    "failed": (made(0.005, errors={3: "x"}), {ERRORS}),
}


@pytest.mark.parametrize(("records", "flags"), FLAGS.values(), ids=FLAGS.keys())
def test_flags(records, flags):
    assert set(summarise(records, requested_per_s=100).flags) == flags


def test_a_client_that_sends_less_than_it_should_is_behind():
    records = made(0.5)
    slow = Records(
        due=records.due, sent=records.due * 1.1, done=records.due * 1.1 + 0.5, which=records.which, errors={}, cpu_s=0.1
    )  # fmt: skip
    assert BEHIND in summarise(slow, requested_per_s=100).flags


def test_a_steady_random_queue_does_not_grow():
    rng = np.random.default_rng(5)
    assert not any(queue_grows(made(rng.exponential(0.05, 2000))) for _ in range(20))


def test_percentiles_are_numpy_s():
    latency = np.linspace(0.001, 0.1, 2000)
    result = summarise(made(latency))
    assert result.at(99) == pytest.approx(np.percentile(latency, 99) * 1e3)
    assert result.latency_ms["min"] == pytest.approx(1) and result.latency_ms["max"] == pytest.approx(100)


def test_nothing_answered():
    records = made(np.nan, errors={n: "no answer" for n in range(2000)})
    result = summarise(records)
    assert result.per_s == 0 and result.at(99) == float("inf") and not result.latency_ms


def test_merged_records_keep_their_errors():
    one, other = made(0.01, count=10), made(0.01, count=10, errors={4: "x"})
    shifted = Records(
        **{**vars(other), "due": other.due + 0.005, "sent": other.sent + 0.005, "done": other.done + 0.005}
    )
    merged = merge([one, shifted])
    assert (np.diff(merged.sent) > 0).all() and merged.errors == {9: "x"}
    assert merged.sent[9] == pytest.approx(0.045) and merged.cpu_s == 2.0


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_clients_share_a_loop(of):
    loop = open_loop(100, 20)
    parts = [loop.share(number, of).offsets_s for number in range(of)]
    assert sorted(np.concatenate(parts)) == sorted(loop.offsets_s)
    closed = [ClosedLoop(in_flight=4, requests=21).share(number, of) for number in range(of)]
    assert sum(part.requests for part in closed) == 21 and sum(part.in_flight for part in closed) == 4


@pytest.mark.parametrize(("in_flight", "of"), [(1, 1), (1, 4), (2, 4), (3, 2), (8, 3)])
def test_no_request_is_given_to_a_client_that_may_send_none(in_flight, of):
    shares = [ClosedLoop(in_flight=in_flight, requests=101).share(number, of) for number in range(of)]
    assert sum(share.requests for share in shares if share.in_flight) == 101
    assert sum(share.in_flight for share in shares) == in_flight


def test_a_repeat_without_answers_is_not_the_fastest():
    silent = summarise(made(np.full(20, 0.01), count=20, errors=dict.fromkeys(range(20), "x")))
    slow = summarise(made(np.full(20, 0.5), count=20))
    assert silent.latency_ms == {} and Repeated(runs=[silent, slow, slow]).median("p99") == slow.at(99.0)
    assert Repeated(runs=[silent]).median("p99") == np.inf


def test_repeats_have_a_middle_and_a_spread():
    runs = [summarise(made(seconds)) for seconds in (0.01, 0.03, 0.02)]
    repeated = Repeated(runs=runs)
    assert repeated.middle is runs[2] and repeated.median("p99") == pytest.approx(20)
    assert repeated.spread("p99") == pytest.approx(1.0)


def test_an_overload_run_needs_answers_to_build_on():
    silent = summarise(made(np.full(20, 0.01), count=20, errors=dict.fromkeys(range(20), "UNAVAILABLE: gone")))
    with pytest.raises(HstuTrtError, match=r"ranking answered none of 20 requests .*: UNAVAILABLE: gone"):
        answered(silent, "ranking")
    whole = summarise(made(0.005))
    assert answered(whole, "ranking") is whole
