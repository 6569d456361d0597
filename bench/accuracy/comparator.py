"""Our runners under Polygraphy's Comparator."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from hstu_trt.bench.chain import Composed
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.numerics import Report, compare
from hstu_trt.contract.tensors import Dim

COMPARED = ("preds", "user_embeddings")
"""What a comparison of accuracy looks at."""


class PolygraphyRunner(BaseRunner):  # type: ignore[misc]
    """One of our runners as Polygraphy drives it; its outputs in float32, so that precisions can be compared."""

    def __init__(self, name: str, runner: Composed, outputs: Collection[str]) -> None:
        super().__init__(name=name)
        self.runner = runner
        self.outputs = outputs

    def activate_impl(self) -> None:
        """Polygraphy's hook: opens the runner."""
        self.runner.__enter__()

    def deactivate_impl(self) -> None:
        """Polygraphy's hook: closes the runner."""
        self.runner.__exit__(None, None, None)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Polygraphy's hook: names, dtypes and shapes of the feed."""
        metadata = TensorMetadata()
        for spec in self.runner.spec.inputs:
            shape = tuple(None if isinstance(dim, Dim) else dim for dim in spec.dims)
            metadata.add(spec.name, np.dtype(spec.dtype), shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, NDArray]) -> Tensors:
        """Polygraphy's hook: one batch."""
        start = time.perf_counter()
        answers = self.runner.infer(feed_dict)
        self.inference_time = time.perf_counter() - start
        return {name: answers[name].astype(np.float32) for name in self.outputs if name in answers}


@dataclass(frozen=True)
class Worst:
    """The largest difference of one output of one runner over all batches."""

    runner: str
    tensor: str
    report: Report
    """Of the batch with the largest difference."""
    first_row: int
    """First candidate of that batch."""
    tolerance: float
    passed: bool
    """Polygraphy's verdict over all batches."""

    def merged(self, earlier: Worst | None) -> Worst:
        """The worse of two, passed if both are."""
        if earlier is None:
            return self
        worse = self if _badness(self.report) > _badness(earlier.report) else earlier
        return dataclasses.replace(worse, passed=self.passed and earlier.passed)

    def row_to_request(self, offsets: NDArray) -> int:
        """The request that the worst row belongs to; ``offsets`` are those of all candidates."""
        row = self.first_row + (self.report.worst[0] if self.report.worst else 0)
        return int(np.searchsorted(offsets, row, side="right")) - 1


def _badness(report: Report) -> tuple[int, float]:
    return report.nonfinite_mismatch, report.max_abs


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the Comparator saw."""

    preds: dict[str, NDArray]
    """Runner -> scores float32 [candidates, tasks] of all batches."""
    worst: list[Worst]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What every runner answered to one feed, and how Polygraphy judges it."""

    feed: Mapping[str, NDArray]
    outputs: dict[str, Tensors]
    """Runner -> its outputs, float32."""
    verdicts: dict[str, dict[str, bool]]
    """Runner -> output with a tolerance -> whether it is within it of the first runner's."""


def run_batches(
    runners: Mapping[str, Composed],
    tolerances: Mapping[str, Mapping[str, float]],
    feeds: Iterable[Tensors],
    outputs: Collection[str] = COMPARED,
) -> Iterator[Batch]:
    """Runs every feed through all runners under the Comparator, and judges each runner against the first.

    tolerances: runner -> output -> largest accepted |difference|; outputs without one are not judged.
    outputs: what is kept of the answers.
    """
    wrapped = [PolygraphyRunner(name, runner, outputs) for name, runner in runners.items()]
    seen: list[Tensors] = []
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        for results in Comparator.run(wrapped, data_loader=_remembered(feeds, seen), streaming=True):
            answers = {name: {key: np.array(value) for key, value in results[name][0].items()} for name in runners}
            verdicts = {
                name: _verdicts(results, number, tolerances[name])
                for number, name in enumerate(runners)
                if number and tolerances[name]
            }
            yield Batch(feed=seen.pop(0), outputs=answers, verdicts=verdicts)


def _remembered(feeds: Iterable[Tensors], seen: list[Tensors]) -> Iterator[Tensors]:
    """The feeds, each noted before it is run."""
    for feed in feeds:
        seen.append(feed)
        yield feed


def compare_runners(
    runners: Mapping[str, Composed], tolerances: Mapping[str, Mapping[str, float]], feeds: Iterator[Tensors]
) -> Comparison:
    """Runs every feed through all runners and compares each with the first; see ``run_batches``."""
    reference, *others = runners
    preds: dict[str, list[NDArray]] = {name: [] for name in runners}
    worst: dict[tuple[str, str], Worst] = {}
    row = 0
    for batch in run_batches(runners, tolerances, feeds):
        for name in runners:
            preds[name].append(batch.outputs[name]["preds"])
        for name in others:
            for tensor, passed in batch.verdicts[name].items():
                report = compare(tensor, batch.outputs[name][tensor], batch.outputs[reference][tensor])
                seen = Worst(name, tensor, report, row, tolerances[name][tensor], passed)
                worst[name, tensor] = seen.merged(worst.get((name, tensor)))
        row += len(preds[reference][-1])
    if not preds[reference]:
        raise InputError("there is no request to compare on")
    return Comparison(preds={name: np.concatenate(parts) for name, parts in preds.items()}, worst=list(worst.values()))


def _verdicts(results: RunResults, number: int, tolerances: Mapping[str, float]) -> dict[str, bool]:
    """Polygraphy's verdict on each output of runner ``number`` of one batch, against runner 0."""
    judge = SimpleCompareFunc(atol=dict(tolerances), rtol=0.0, check_error_stat="elemwise")
    accuracy = Comparator.compare_accuracy(results, comparisons=[(0, number)], compare_func=judge)
    (batches,) = accuracy[0].values()
    verdicts = {name: bool(verdict) for name, verdict in batches[0].items()}
    return {name: verdicts.get(name, False) for name in tolerances}
