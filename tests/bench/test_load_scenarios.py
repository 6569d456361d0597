"""Scenarios on a sender that answers by a law of its own, without waiting."""

import numpy as np
import pytest

from hstu_trt.bench.load.client import ClosedLoop, Records
from hstu_trt.bench.load.scenarios import Bound, Outcome, Plan, Scenarios, highest_rate, sweep_rates
from hstu_trt.bench.load.stats import Repeated, summarise
from hstu_trt.contract.errors import ConfigError

SERVICE_S = 0.005


class Law:
    """One server of 5 ms in simulated time; 1 % of the answers take ``tail_s`` longer."""

    processes = 1

    def __init__(self, tail_s=0.0, error_above=None):
        self.tail_s, self.error_above, self.loops = tail_s, error_above, []

    def run(self, loop):
        self.loops.append(loop)
        if isinstance(loop, ClosedLoop):
            count = min(loop.requests, round(loop.seconds / SERVICE_S) if np.isfinite(loop.seconds) else loop.requests)
            due = np.maximum(0, np.arange(count) - loop.in_flight + 1) * SERVICE_S
        else:
            due, count = loop.offsets_s, len(loop.offsets_s)
        done, free = np.empty(count), 0.0
        for number, moment in enumerate(due):
            free = max(free, moment) + SERVICE_S
            done[number] = free
        done += np.where(np.arange(count) % 50 == 0, self.tail_s, 0.0)
        rate = count / max(due[-1], 1e-9)
        errors = {0: "x"} if self.error_above and rate > self.error_above else {}
        return Records(due=due, sent=due, done=done, which=np.zeros(count, int), errors=errors, cpu_s=0.0)


def scenarios(law, **plan):
    said = []
    settings = {"seconds": 30.0, "probe_seconds": 30.0, "repeats": 2, "bound": Bound(ms=20.0), **plan}
    return Scenarios(sender=law, plan=Plan(**settings), progress=said.append), said


def test_offline_finds_the_throughput():
    runs, _ = scenarios(Law())
    outcome = runs.offline()
    assert outcome.repeated.median("per_s") == pytest.approx(200, rel=0.02) and outcome.name == "offline 8 in flight"
    assert len(outcome.repeated.runs) == 2


def test_single_is_the_service_time():
    runs, _ = scenarios(Law(), single_requests=100)
    assert runs.single().repeated.median("p50") == pytest.approx(5)


def test_server_finds_the_rate_at_the_bound():
    """M/D/1: waiting decays by x, load * (e^x - 1) = x, per service time; p99 is 4 services at a load of 0.455."""
    runs, said = scenarios(Law(), seconds=100.0, probe_seconds=100.0)
    outcome = runs.server(guess=30)
    assert outcome.found["kept"] and outcome.found["bound"] == "p99 <= 20 ms"
    assert 80 < outcome.found["rate"] < 97
    assert any(not probe["kept"] for probe in outcome.found["probes"]) and any("kept: True" in line for line in said)


def test_server_steps_down_where_longer_runs_miss_the_bound():
    law = Law()
    runs, _ = scenarios(law, seconds=10.0, probe_seconds=1.0)
    outcome = runs.server(guess=150)
    steps = [len(loop.offsets_s) for loop in law.loops if not isinstance(loop, ClosedLoop)]
    assert outcome.found["kept"] and runs.kept(outcome) and steps


def test_of_two_repeats_the_worse_one_decides():
    """Their mean is no run: one within the bound and one beyond it did not keep it."""
    runs, _ = scenarios(Law(), bound=Bound(ms=80.0))
    quick, slow = (summarise(Law(tail_s=tail).run(ClosedLoop(in_flight=1, requests=2000))) for tail in (0.06, 0.09))
    assert quick.at(99) < 80 < slow.at(99) and quick.at(99) + slow.at(99) < 170
    outcomes = [
        Outcome(scenario="server", setting="", repeated=Repeated(runs=each)) for each in ([quick, slow], [quick] * 2)
    ]
    assert [runs.kept(outcome) for outcome in outcomes] == [False, True]


def test_server_that_never_keeps_the_bound_says_so():
    runs, _ = scenarios(Law(tail_s=1.0), seconds=5.0, probe_seconds=5.0)
    outcome = runs.server(guess=100)
    assert not outcome.found["kept"] and outcome.found["rate"] < 1


def test_one_hiccup_does_not_decide_the_search():
    class Hiccup(Law):
        def run(self, loop):
            self.tail_s = 1.0 if len(self.loops) == 0 else 0.0
            return super().run(loop)

    runs, _ = scenarios(Hiccup(), seconds=100.0, probe_seconds=100.0)
    assert 80 < runs.server(guess=60).found["rate"] < 97


def test_errors_do_not_count_as_fast():
    runs, _ = scenarios(Law(error_above=50))
    assert runs.server(guess=20).found["rate"] <= 50


def test_counters_are_marked_after_the_search():
    marks, law = [], Law()
    runs = Scenarios(
        sender=law, plan=Plan(seconds=5, probe_seconds=5, repeats=2, bound=Bound(ms=20)),
        progress=lambda text: None, before_repeats=lambda: marks.append(len(law.loops)),
    )  # fmt: skip
    runs.server(guess=50)
    assert marks and len(law.loops) - marks[-1] == 2


@pytest.mark.parametrize("limit", [3.0, 77.0, 123.4, 5000.0])
@pytest.mark.parametrize("guess", [10.0, 100.0])
def test_the_search_is_within_its_tolerance(limit, guess):
    tries = []
    found = highest_rate(lambda rate: tries.append(rate) or rate <= limit, guess, 0.05)
    if limit < 5000:
        assert limit / 1.06 < found <= limit
    assert found <= limit and len(tries) <= 13


def test_a_search_without_hope_ends():
    assert highest_rate(lambda rate: False, 100.0, 0.05) <= 0.1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Bound(ms=0),
        lambda: Bound(ms=10, percentile=98),
        lambda: Plan(repeats=0),
        lambda: Plan(seconds=0),
        lambda: highest_rate(bool, 0.0, 0.1),
    ],
)
def test_wrong_settings_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_a_curve_ends_at_the_highest_rate():
    assert list(sweep_rates(100.0))[-1] == 100.0
