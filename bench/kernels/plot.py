"""The kernel benchmark as a picture: TFLOP/s over history length, and a roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hstu_trt.bench.kernels.cases import MEMORY_BYTES_PER_S, Dtype, KernelCase, sweep_cases, table_cases
from hstu_trt.bench.kernels.variants import GEMM_CASE, GEMM_NAMES, REFERENCES
from hstu_trt.bench.report.svg import LinearScale, LogScale, Picture, Point, spread_apart
from hstu_trt.bench.result_rows import ResultRow, latest, sources
from hstu_trt.contract.errors import ArtefactError

_WIDTH, _HEIGHT = 1040, 486
_TOP, _BOTTOM = 92, 410


@dataclass(frozen=True)
class Series:
    """A variant with its look."""

    variant: str
    dtype: Dtype
    colour: str
    shape: str


SERIES = (
    Series("fp16", "fp16", "a", "circle"),
    Series("bf16", "bf16", "b", "square"),
    Series("fp8 packed", "fp8", "c", "diamond"),
)
_SOFTMAX = REFERENCES["cudnn"]

Rows = Mapping[tuple[str, str], ResultRow]


def plot(rows: Sequence[ResultRow]) -> str:
    """The SVG of the newest rows. Raises ArtefactError where there is none to draw."""
    newest = latest(row for row in rows if row.suite == "kernels" and row.tflops)
    cases = {case.name for case in (*table_cases(), *sweep_cases())}
    drawn = [row for (case, variant), row in newest.items() if case in cases and variant in {s.variant for s in SERIES}]
    if not drawn:
        raise ArtefactError("there are no rows to draw: `make bench-kernels` measures them on a CUDA GPU")
    picture = Picture(_WIDTH, _HEIGHT, "TFLOP/s of HSTU attention over history length, and a roofline")
    _legend(picture)
    _draw_sweep(picture, newest)
    _draw_roofline(picture, newest)
    found = [f"{device}, {day}, commit {commit}" for device, day, commit in sources(drawn)]
    picture.text((24, _HEIGHT - 14), "; ".join(found), "small")
    return picture.render()


def _legend(picture: Picture) -> None:
    x = 24.0
    for series in SERIES:
        picture.line([(x, 22), (x + 26, 22)], f"line {series.colour}")
        picture.dot((x + 13, 22), series.colour, series.shape)
        picture.text((x + 32, 26), series.variant)
        x += 60 + 7 * len(series.variant)
    for style, label in (("line n dotted", "cuDNN softmax, causal, fp16"), ("axis dashed", "GEMM 8192 of that dtype")):
        picture.line([(x, 22), (x + 26, 22)], style)
        picture.text((x + 32, 26), label)
        x += 60 + 6.2 * len(label)


# Left: one line per dtype, solid with candidates, dashed without.


def _draw_sweep(picture: Picture, rows: Rows) -> None:
    lengths = sorted({case.histories[0] for case in sweep_cases()})
    names = {case.name for case in sweep_cases()}
    highest = max((row.tflops or 0 for (case, _), row in rows.items() if case in {*names, GEMM_CASE}), default=0)
    top = 200 * math.ceil((highest or 1) / 200)
    x = LogScale((lengths[0], lengths[-1]), (70, 480))
    y = LinearScale((0, top), (_BOTTOM, _TOP))
    picture.text((24, 58), "TFLOP/s over history length, 4 heads of 128", "title")
    picture.text((24, 76), "65,536 history tokens in all; solid: 2048 candidates per user, dashed: none", "small")
    for value in range(0, top + 1, 200):
        picture.line([(70, y(value)), (490, y(value))], "rule")
        picture.text((62, y(value) + 4), str(value), "small", "end")
    for length in lengths:
        picture.text((x(length), _BOTTOM + 18), str(length), "small", "middle")
    picture.text((275, _BOTTOM + 36), "history tokens per user", "small", "middle")
    for series in SERIES:
        if series.dtype != "bf16" and (ceiling := _ceiling_tflops(rows, series)):
            picture.line([(70, y(ceiling)), (490, y(ceiling))], f"axis dashed {series.colour}")
            text = f"GEMM {series.dtype} {ceiling:.0f}"
            picture.text((490, y(ceiling) - 4), text, f"small {series.colour}", "end")
    _sweep_line(picture, rows, _SOFTMAX, 0, x, y, "line n dotted")
    for series in SERIES:
        for candidates, dash in ((0, " dashed"), (2048, "")):
            points = _sweep_line(picture, rows, series.variant, candidates, x, y, f"line {series.colour}{dash}")
            for point in points:
                picture.dot(point, series.colour, series.shape)


def _sweep_line(
    picture: Picture, rows: Rows, variant: str, candidates: int, x: LogScale, y: LinearScale, style: str
) -> list[Point]:
    points = [
        (x(case.histories[0]), y(row.tflops or 0))
        for case in sweep_cases()
        if case.candidates == candidates and (row := rows.get((case.name, variant)))
    ]
    if points:
        picture.line(points, style)
    return points


def _ceiling_tflops(rows: Rows, series: Series) -> float | None:
    """The rate of a large GEMM of the series' dtype."""
    row = rows.get((GEMM_CASE, GEMM_NAMES[series.dtype]))
    return row.tflops if row else None


# Right: each case of the table as a point under the roofs of memory and tensor cores.

_ROOF_X = (590.0, 920.0)
_LABELS_X = 944.0
_TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class _Mark:
    case: KernelCase
    series: Series
    at: Point

    @property
    def name(self) -> str:
        return self.case.name.replace("B16 ", "").removesuffix(" 4x128") if self.case.cached else self.case.name


def _draw_roofline(picture: Picture, rows: Rows) -> None:
    x = LogScale((30, 5000), _ROOF_X)
    slowest = min((row.tflops for row in _table_rows(rows).values() if row.tflops), default=50)
    low = max((n for n in _TICKS[:6] if n <= slowest), default=_TICKS[0])
    y = LogScale((low, 2000), (_BOTTOM, _TOP))
    memory = MEMORY_BYTES_PER_S / 1e12
    picture.text((544, 58), "Roofline of the table's cases", "title")
    picture.text((544, 76), f"operations per byte that must move; memory at {memory:.2f} TB/s", "small")
    for value in (tick for tick in _TICKS if low <= tick <= 2000):
        picture.line([(_ROOF_X[0], y(value)), (_ROOF_X[1], y(value))], "rule")
        picture.text((_ROOF_X[0] - 8, y(value) + 4), str(value), "small", "end")
    for value in _TICKS[5:]:
        picture.text((x(value), _BOTTOM + 18), str(value), "small", "middle")
    picture.text((sum(_ROOF_X) / 2, _BOTTOM + 36), "FLOP per byte", "small", "middle")
    picture.line([(x(n), y(n * memory)) for n in (max(30, low / memory), 2000 / memory)], "axis")
    for series in SERIES:
        if series.dtype != "bf16" and (ceiling := _ceiling_tflops(rows, series)):
            begin = x(ceiling / memory)
            picture.line([(begin, y(ceiling)), (_ROOF_X[1], y(ceiling))], f"axis dashed {series.colour}")
            text = f"GEMM {series.dtype} {ceiling:.0f}"
            picture.text((begin - 8, y(ceiling) + 4), text, f"small {series.colour}", "end")
    _roofline_marks(picture, _marks(rows, x, y))


def _table_rows(rows: Rows) -> dict[tuple[KernelCase, Series], ResultRow]:
    """The rows that the roofline shows: bf16 would lie on fp16."""
    wanted = [(case, series) for series in SERIES if series.dtype != "bf16" for case in table_cases()]
    found = {(case, series): rows.get((case.name, series.variant)) for case, series in wanted}
    return {key: row for key, row in found.items() if row is not None}


def _marks(rows: Rows, x: LogScale, y: LogScale) -> list[_Mark]:
    return [
        _Mark(case, series, (x(case.flops / case.bytes_moved(series.dtype)), y(row.tflops)))
        for (case, series), row in _table_rows(rows).items()
        if row.tflops
    ]


def _roofline_marks(picture: Picture, marks: Sequence[_Mark]) -> None:
    """Points with their names: those of the long cases, which crowd, in a column on the right."""
    crowd = [mark for mark in marks if mark.case.uniform and not mark.case.cached]
    for mark, height in zip(crowd, spread_apart([mark.at[1] for mark in crowd], 12), strict=True):
        style = f"small {mark.series.colour}"
        picture.line([mark.at, (_LABELS_X - 14, height), (_LABELS_X - 4, height)], f"axis thin {mark.series.colour}")
        picture.text((_LABELS_X, height + 3.5), mark.name, style)
    for mark in marks:
        picture.dot(mark.at, mark.series.colour, mark.series.shape)
        if mark in crowd:
            continue
        # To the right, unless the crowd is there.
        (across, down), anchor = ((4, 16), "end") if mark.case.candidates == 2048 else ((9, 3.5), "start")
        picture.text((mark.at[0] + across, mark.at[1] + down), mark.name, f"small {mark.series.colour}", anchor)
