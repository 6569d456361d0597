"""Rounds, spreads and numbers of input sets; what needs a GPU is timed in the gpu tests."""

import pytest

from hstu_trt.bench.timing import Timing, _graph_repeats, input_sets, time_in_turn


class Recorder:
    """A contender that notes when it is asked."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def measure_us(self, target_ms: float) -> float:
        self.log.append(self.name)
        return target_ms + len(self.log)


def test_each_round_begins_with_another_contender() -> None:
    log: list[str] = []
    rounds = time_in_turn({name: Recorder(name, log) for name in "abc"}, rounds=4, target_ms=10)
    assert log == [*"abc", *"bca", *"cab", *"abc"]
    assert rounds["a"] == [11, 16, 18, 20]
    assert time_in_turn({}, rounds=2, target_ms=1) == {}


def test_spread_is_a_share_of_the_median() -> None:
    assert Timing.of([100.0, 90.0, 120.0]) == Timing(median_us=100.0, spread=0.3)


@pytest.mark.parametrize(("megabytes", "sets"), [(1, 8), (20, 5), (50, 2), (1000, 2), (0, 8)])
def test_input_sets_exceed_the_cache_twice(megabytes: int, sets: int) -> None:
    assert input_sets(megabytes * 10**6, 50 * 10**6) == sets


@pytest.mark.parametrize(("call_us", "calls", "repeats"), [(40, 2, 25), (5000, 2, 1), (0.5, 8, 25), (600, 3, 2)])
def test_graphs_are_long_enough_and_not_too_long(call_us: float, calls: int, repeats: int) -> None:
    assert _graph_repeats(call_us, calls) == repeats
