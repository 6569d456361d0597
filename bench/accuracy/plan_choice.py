"""Which parts of a model stay in fp8: what each costs alone, and what together still fits the gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hstu_trt.bench.accuracy.fidelity import Figure
from hstu_trt.contract.gates import RankingGates
from hstu_trt.contract.text import text_table

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What some parts in fp8 cost."""

    name: str
    sites: tuple[str, ...]
    share: float
    """Of the model's multiplications, in fp8."""
    figures: tuple[Figure, ...]
    """The gated figures, the worst task's each."""

    @property
    def within(self) -> bool:
        """Whether every gate holds."""
        return all(figure.passed for figure in self.figures)

    def value(self, name: str) -> float:
        """A figure by name; NaN where the requests do not have it."""
        return next((figure.value for figure in self.figures if figure.name == name), float("nan"))


class Trials(Protocol):
    """What can be tried: parts in fp8, judged by the gates."""

    @property
    def sites(self) -> tuple[str, ...]: ...

    def trial(self, name: str, sites: Sequence[str], gates: RankingGates) -> Trial: ...


def choose(study: Trials, gates: RankingGates, progress: Progress) -> tuple[list[Trial], list[Trial]]:
    """The trial of each part alone, and the steps of the choice; the last step is the choice."""
    alone = []
    for site in study.sites:
        progress(f"{site} in fp8")
        alone.append(study.trial(site, (site,), gates))
    dearest = sorted(alone, key=_price, reverse=True)
    kept, left_out = list(study.sites), []
    steps = [study.trial("all parts", kept, gates)]
    for trial in dearest:
        if steps[-1].within:
            break
        kept.remove(trial.name)
        left_out.append(trial.name)
        progress(f"without {trial.name}")
        steps.append(study.trial(f"- {trial.name}", kept, gates))
    for site in reversed(left_out[:-1]):
        attempt = [s for s in study.sites if s in kept or s == site]
        progress(f"with {site} again")
        trial = study.trial(f"+ {site}", attempt, gates)
        if trial.within:
            kept = attempt
            steps.append(trial)
    return alone, steps


def _price(trial: Trial) -> float:
    """Entropy paid per multiplication saved; scores that are not finite cost everything."""
    price = trial.value("entropy_change") / max(trial.share, 1e-9)
    return price if np.isfinite(price) else float("inf")


def table(trials: Sequence[Trial]) -> str:
    """The trials for people: what each costs against fp32."""
    names = ("entropy_change", "accuracy_ratio", "gauc_ratio", "request_entropy_change", "request_max_logit")
    shown = [name for name in names if any(figure.name == name for trial in trials for figure in trial.figures)]
    rows = [
        (t.name, f"{100 * t.share:.1f} %", *(f"{t.value(name):.5g}" for name in shown),
         "ok" if t.within else "beyond")
        for t in trials
    ]  # fmt: skip
    return text_table(("in fp8", "of the work", *shown, ""), rows)


def facts(trial: Trial) -> dict[str, object]:
    """A trial as a JSON object."""
    figures = {figure.name: figure.value for figure in trial.figures}
    row = {"name": trial.name, "share": trial.share, **figures, "within": trial.within}
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in row.items()}
