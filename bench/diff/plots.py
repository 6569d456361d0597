"""The pictures of a comparison of two runners, small enough for a phone: error by layer and by length, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.diff.report import DiffReport
from hstu_trt.bench.report.svg import LinearScale, LogScale, Picture
from hstu_trt.contract.split_users import TAP_PREFIX

_WIDTH, _HEIGHT = 460, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 444.0, 70.0, 276.0
_MOST_DOTS = 1500
_BARS = 41
_MOST_LABELS = 9
_SHORT = {
    "uih_embeddings": "uih",
    "candidate_embeddings": "cand",
    "contextual_embeddings": "ctx",
    "user_embeddings": "user",
    "ranking_fused.preds": "fused",
}

Scale = Callable[[float], float]


def pictures(report: DiffReport) -> list[str]:
    """The SVGs, in the order of the report."""
    return [picture.render() for picture in (_layers(report), _lengths(report), _scatter(report), _histogram(report))]


def _frame(title: str, subtitle: str, x_name: str) -> Picture:
    picture = Picture(_WIDTH, _HEIGHT, title)
    picture.text((16, 26), title, "title")
    picture.text((16, 44), subtitle, "small")
    picture.text(((_LEFT + _RIGHT) / 2, _HEIGHT - 12), x_name, "small", "middle")
    return picture


def _powers(values: Iterable[float]) -> tuple[float, float]:
    """The powers of ten around the positive values; a decade where there is none."""
    positive = [value for value in values if 0 < value < math.inf]
    if not positive:
        return 1e-8, 1e-7
    low, high = 10.0 ** math.floor(math.log10(min(positive))), 10.0 ** math.ceil(math.log10(max(positive)))
    return low, high if high > low else 10 * low


def _decades(picture: Picture, low: float, high: float) -> Scale:
    """A logarithmic y axis with its rules; values below ``low``, 0 among them, stand on the ground."""
    scale = LogScale((low, high), (_BOTTOM, _TOP))
    first, last = round(math.log10(low)), round(math.log10(high))
    for power in range(first, last + 1, max(1, (last - first) // 6)):
        picture.line([(_LEFT, scale(10.0**power)), (_RIGHT, scale(10.0**power))], "rule")
        picture.text((_LEFT - 8, scale(10.0**power) + 4), f"1e{power}", "small", "end")
    return lambda value: scale(min(max(value, low), high))


def _layers(report: DiffReport) -> Picture:
    """Error of each output in the order of the graph, and its tolerance."""
    outputs, totals = report.outputs, [output.total for output in report.outputs]
    picture = _frame("Error by layer", "blue: max |difference|, green: relative L2, orange: tolerance", "output")
    tolerances = [output.tolerance or 0.0 for output in outputs]
    y = _decades(picture, *_powers([*(t.max_abs for t in totals), *(t.relative_l2 for t in totals), *tolerances]))
    step = (_RIGHT - _LEFT) / len(outputs)
    places = [_LEFT + step * (number + 0.5) for number in range(len(outputs))]
    for name, values in (("a", [t.max_abs for t in totals]), ("b", [t.relative_l2 for t in totals])):
        picture.line([(x, y(value)) for x, value in zip(places, values, strict=True) if value], f"line {name}")
    for number, (x, output, total) in enumerate(zip(places, outputs, totals, strict=True)):
        if output.tolerance:
            picture.line([(x - step / 3, y(output.tolerance)), (x + step / 3, y(output.tolerance))], "line c")
        if total.max_abs:
            picture.dot((x, y(total.max_abs)), "a" if output.passed else "c", "circle" if output.passed else "diamond")
            picture.dot((x, y(total.relative_l2)), "b", "square")
        else:
            picture.text((x, _BOTTOM - 6), "equal", "small", "middle")
        if number % -(-len(outputs) // _MOST_LABELS) == 0:
            picture.text((x, _BOTTOM + 18), _short(output.name), "small", "middle")
    return picture


def _short(name: str) -> str:
    return name.removesuffix(".out") if name.startswith(TAP_PREFIX) else _SHORT.get(name, name)


def _lengths(report: DiffReport) -> Picture:
    """The largest difference of a score of each request, over its length of history."""
    preds, lengths = report.output("preds"), report.requests.history_lengths
    picture = _frame(
        "Error over length of history", "largest |difference| of a score: dots by request, line by bucket", "events"
    )
    y = _decades(picture, *_powers([*preds.errors.max_abs, preds.tolerance or 0.0]))
    longest = max(2, int(lengths.max()) + 1)
    x = LogScale((1, longest), (_LEFT + 8, _RIGHT - 8))
    for tick in (0, *(4**n for n in range(9))):
        if tick < longest:
            picture.text((x(tick + 1), _BOTTOM + 18), str(tick), "small", "middle")
    _tolerance_line(picture, y, preds.tolerance)
    errors = preds.errors.max_abs
    for row in _sample(errors):
        picture.dot((x(float(lengths[row]) + 1), y(float(errors[row]))), "a faint", radius=2.6)
    worst = [(bucket, preds.errors.among(bucket.rows).max_abs) for bucket in report.buckets()]
    picture.line([(x(float(np.median(lengths[b.rows])) + 1), y(largest)) for b, largest in worst], "line b")
    return picture


def _tolerance_line(picture: Picture, y: Scale, tolerance: float | None) -> None:
    if tolerance:
        picture.line([(_LEFT, y(tolerance)), (_RIGHT, y(tolerance))], "line c dashed")
        picture.text((_RIGHT, y(tolerance) - 5), f"tolerance {tolerance:g}", "small c", "end")


def _sample(errors: NDArray) -> Sequence[int]:
    """Rows to draw: all, or the worst and an even choice of the rest."""
    if len(errors) <= _MOST_DOTS:
        return range(len(errors))
    order = np.argsort(-errors, kind="stable")
    worst, rest = order[: _MOST_DOTS // 3], order[_MOST_DOTS // 3 :]
    even = np.linspace(0, len(rest) - 1, _MOST_DOTS - len(worst)).astype(int)
    return [*worst.tolist(), *rest[even].tolist()]


def _scatter(report: DiffReport) -> Picture:
    """B's scores over A's, all tasks."""
    a, b = (side.astype(np.float64).ravel() for side in (report.preds_a, report.preds_b))
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    picture = _frame("Scores", "B over A, a dot per candidate; on the line both agree", f"A: {report.a}")
    low, high = _range(np.concatenate([a, b]))
    x, y = LinearScale((low, high), (_LEFT, _RIGHT)), LinearScale((low, high), (_BOTTOM, _TOP))
    for number in range(5):
        value = low + (high - low) * number / 4
        picture.line([(_LEFT, y(value)), (_RIGHT, y(value))], "rule")
        picture.text((_LEFT - 8, y(value) + 4), f"{value:.3g}", "small", "end")
        picture.text((x(value), _BOTTOM + 18), f"{value:.3g}", "small", "end" if number == 4 else "middle")
    picture.line([(x(low), y(low)), (x(high), y(high))], "axis dashed")
    for row in _sample(np.abs(b - a)):
        picture.dot((x(float(a[row])), y(float(b[row]))), "a faint", radius=2.2)
    return picture


def _range(values: NDArray) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _histogram(report: DiffReport) -> Picture:
    """How many scores differ by how much."""
    difference = (report.preds_b.astype(np.float64) - report.preds_a.astype(np.float64)).ravel()
    difference = difference[np.isfinite(difference)]
    edge = float(np.abs(difference).max(initial=0.0)) or 1e-8
    counts, _ = np.histogram(difference, _BARS, (-edge, edge))
    picture = _frame("Differences", f"B - A of {difference.size} scores, counts on a logarithmic scale", "B - A")
    most = 10 ** max(1, math.ceil(math.log10(counts.max(initial=1))))
    y = LogScale((0.5, most), (_BOTTOM, _TOP))
    for power in range(round(math.log10(most)) + 1):
        picture.line([(_LEFT, y(10**power)), (_RIGHT, y(10**power))], "rule")
        picture.text((_LEFT - 8, y(10**power) + 4), str(10**power), "small", "end")
    width = (_RIGHT - _LEFT) / _BARS
    for number, count in enumerate(counts):
        if count:
            corner = (_LEFT + number * width + 0.5, y(int(count)))
            picture.bar(corner, (width - 1, _BOTTOM - corner[1]), "a")
    for share in (-1.0, -0.5, 0.0, 0.5, 1.0):
        at = (_LEFT + _RIGHT) / 2 + share * (_RIGHT - _LEFT) / 2
        anchor = {-1.0: "start", 1.0: "end"}.get(share, "middle")
        picture.text((at, _BOTTOM + 18), f"{share * edge:.1e}" if share else "0", "small", anchor)
    return picture
