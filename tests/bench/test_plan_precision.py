"""The precision planner on the real demo model, and its choice on made-up costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hstu_trt.bench.accuracy.fidelity import Figure
from hstu_trt.bench.accuracy.plan_precision import Trial, choose, table
from hstu_trt.contract.cli import main
from hstu_trt.contract.fp8_plan import fp8_sites, read_plan
from hstu_trt.contract.gates import RANKING_GATES, RankingGates
from hstu_trt.contract.model_folder import read_model_folder

GATES = dataclasses.replace(RANKING_GATES, entropy_change=1.0)


class FakeStudy:
    """Costs that add up. All parts are equally much work, but for the last, which is most of it."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs = costs
        last = [*costs][-1]
        self.share = {name: 0.9 if name == last else 0.1 / max(1, len(costs) - 1) for name in costs}

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.costs)

    def trial(self, name: str, sites: Sequence[str], gates: RankingGates) -> Trial:
        cost = sum(self.costs[site] for site in sites)
        figure = Figure(name="entropy_change", value=cost, gate=gates.entropy_change)
        return Trial(name=name, sites=tuple(sites), share=sum(self.share[s] for s in sites), figures=(figure,))


@pytest.mark.parametrize(
    ("costs", "kept"),
    [
        ({"a": 0.1, "b": 0.2, "c": 0.3}, ("a", "b", "c")),
        ({"a": 0.9, "b": 0.2, "c": 0.1}, ("b", "c")),
        # The last part is dear, but most of the work: cheaper ones go before it.
        ({"a": 0.3, "b": 0.3, "c": 0.9}, ("c",)),
        # Without a it still does not fit, without b it does; then a fits again.
        ({"a": 0.5, "b": 0.45, "c": 0.1, "d": 0.5}, ("c", "d")),
        ({"a": 2.0, "b": 3.0}, ()),
        ({"a": float("nan"), "b": 0.1}, ("b",)),
    ],
)
def test_the_dearest_parts_per_work_go_first(costs: dict[str, float], kept: tuple[str, ...]) -> None:
    alone, steps = choose(FakeStudy(costs), GATES, lambda _: None)
    assert [trial.name for trial in alone] == list(costs)
    assert steps[-1].sites == kept and steps[-1].within
    assert ("beyond" in table(steps)) == (len(steps) > 1)


def test_a_part_that_fits_again_comes_back() -> None:
    class Jumpy(FakeStudy):
        def trial(self, name: str, sites: Sequence[str], gates: RankingGates) -> Trial:
            together = {"a", "b"} <= set(sites)
            trial = super().trial(name, sites, gates)
            return trial if not together else dataclasses.replace(trial, figures=(Figure(name="x", value=2, gate=1),))

    _, steps = choose(Jumpy({"a": 0.4, "b": 0.9, "c": 0.05}), GATES, lambda _: None)
    assert steps[-1].sites == ("a", "c")


def test_the_demo_model(exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = read_model_folder(exported("fp32"))
    options = ["--requests", "24", "--calibration-requests", "8", "--json", "--out", str(tmp_path)]
    capsys.readouterr()
    assert main(["bench", "plan-precision", "--model", str(model.path), *options]) == 0
    result = json.loads(capsys.readouterr().out)
    sites = fp8_sites(model.config)
    assert sorted(result["fp8"] + result["fp16"]) == sorted(sites)
    trials = {trial["name"]: trial for trial in result["trials"]}
    assert set(sites) <= set(trials) and sum(trials[site]["share"] for site in sites) == pytest.approx(1)
    assert all(0 < trials[site]["entropy_change"] < 1e-3 for site in sites), "figures are free of the labels' noise"
    assert read_plan(tmp_path / "plan.json", model.config).fp8 == tuple(result["fp8"])
    from hstu_trt.export.calibration import calibration_requests

    packed = calibration_requests(model.config, model.limits, str(tmp_path / "calibration.safetensors"))
    assert len(packed["uih_offsets"]) == 9


def test_no_budget_keeps_everything_out_of_fp8(exported: Callable[[str], Path], tmp_path: Path) -> None:
    options = ["--requests", "2", "--calibration-requests", "2", "--max-entropy-change", "0", "--out", str(tmp_path)]
    assert main(["bench", "plan-precision", "--model", str(exported("fp32")), *options]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["fp8"] == []


def test_a_model_in_fp8_is_refused(exported: Callable[[str], Path], tmp_path: Path, capsys) -> None:
    assert main(["bench", "plan-precision", "--model", str(exported("fp8")), "--out", str(tmp_path)]) == 2
    assert "plan with the model's fp32 folder" in capsys.readouterr().err
