"""The pictures of the report, small enough for a phone: latency over throughput, time per step, batches, a roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hstu_trt.bench.kernels.cases import MEMORY_BYTES_PER_S, Dtype, table_cases
from hstu_trt.bench.kernels.variants import GEMM_CASE, GEMM_NAMES
from hstu_trt.bench.load.rows import own_steps
from hstu_trt.bench.report.svg import LinearScale, LogScale, Picture
from hstu_trt.bench.result_rows import ResultRow, latest

WIDTH, HEIGHT = 460, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 444.0, 74.0, 268.0
_COLOURS = ("a", "c", "b", "n")
_NICE = (1, 2, 5)
_STEP_COLOURS = {"embedding_lookup": "b", "hstu": "a", "mlp_head": "c"}
"""A model of one step is neutral."""


def frame(title: str, subtitle: str, x_name: str = "", height: int = HEIGHT) -> Picture:
    """A picture with its titles."""
    picture = Picture(WIDTH, height, title)
    picture.text((16, 26), title, "title")
    picture.text((16, 44), subtitle, "small")
    picture.text(((_LEFT + _RIGHT) / 2, height - 12), x_name, "small", "middle")
    return picture


def nice_step(span: float, most: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that cuts a span into at most so many parts."""
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(n * power for n in (*_NICE, 10) if span / (n * power) <= most)


def curve(rows: Mapping[str, Sequence[ResultRow]], bound_ms: float | None) -> str:
    """p50 and p99 over requests per second of served models, from their open rows, and the bound's line."""
    points = {
        served: sorted(
            (row.per_s or 0.0, row.details["run"]["latency_ms"]) for row in runs if row.details["run"]["latency_ms"]
        )
        for served, runs in rows.items()
    }
    latencies = [ms[p] for line in points.values() for _, ms in line for p in ("p50", "p99")] + [bound_ms or 1.0]
    low, high = 10 ** math.floor(math.log10(min(latencies))), 10 ** math.ceil(math.log10(max(latencies) * 1.01))
    most = max(per_s for line in points.values() for per_s, _ in line) * 1.05
    picture = frame("Latency over throughput", "Poisson arrivals; solid p99, dashed p50, in ms", "requests per second")
    x, y = LinearScale((0, most), (_LEFT, _RIGHT)), LogScale((low, high), (_BOTTOM, _TOP))
    _log_axis(picture, y, low, high)
    _linear_axis(picture, x, most)
    if bound_ms:
        picture.line([(_LEFT, y(bound_ms)), (_RIGHT, y(bound_ms))], "axis dotted c")
        picture.text((_LEFT + 4, y(bound_ms) - 4), f"bound {bound_ms:g} ms", "small c")
    for number, (served, line) in enumerate(points.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for p, style in (("p50", "dashed"), ("p99", "")):
            picture.line([(x(per_s), y(ms[p])) for per_s, ms in line], f"line {style} {colour}")
        for per_s, ms in line:
            picture.dot((x(per_s), y(ms["p99"])), colour)
        picture.text((_LEFT + 4 + 150 * number, 64), served, colour)
    return picture.render()


def _log_axis(picture: Picture, y: LogScale, low: float, high: float) -> None:
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        picture.line([(_LEFT, y(10.0**power)), (_RIGHT, y(10.0**power))], "rule")
        picture.text((_LEFT - 8, y(10.0**power) + 4), f"{10.0**power:g}", "small", "end")


def _linear_axis(picture: Picture, x: LinearScale, most: float) -> None:
    step, value = nice_step(most, 6), 0.0
    while value <= most:
        picture.text((x(value), _BOTTOM + 18), f"{value:g}", "small", "middle")
        value += step


def breakdown(rows: Sequence[ResultRow]) -> str:
    """Where a request spends its time, as shares: each step's queue (faint) and computing."""
    height = 96 + 34 * len(rows)
    picture = frame("Where the time goes", "share of the time in the server; faint: waiting", height=height)
    for number, row in enumerate(rows):
        top, left = 84.0 + 34 * number, 16.0
        parts = step_times(row)
        total = sum(queue + compute for _, queue, compute in parts) or 1.0
        picture.text((16, top), f"{row.variant}: {total:.3g} ms", "small")
        for name, queue, compute in parts:
            for share, style in ((queue / total, " faint"), (compute / total, "")):
                width = share * (_RIGHT - 16)
                picture.bar((left, top + 5), (width, 13), f"{_STEP_COLOURS.get(name, 'n')}{style}")
                left += width
    for place, (name, colour) in zip((16, 150, 220, 310), {**_STEP_COLOURS, "one model": "n"}.items(), strict=True):
        picture.text((place, 62), name, colour)
    return picture.render()


def step_times(row: ResultRow) -> list[tuple[str, float, float]]:
    """(step, ms in its queue, ms computing) of a row; an ensemble's own entry, the sum of its steps, is left out."""
    steps = own_steps(row)
    return [
        (name, steps[name]["ms"]["queue"], sum(steps[name]["ms"][f"compute_{p}"] for p in ("input", "infer", "output")))
        for name in [name for name in steps if name != row.details["served"]] or list(steps)
    ]


def batches(row: ResultRow) -> str:
    """How many requests Triton put into a batch."""
    counts = {int(size): cell[0] for size, cell in row.details["steps"][row.details["served"]]["batches"].items()}
    picture = frame("Batch sizes", f"executions of {row.variant}", "requests in a batch")
    largest, most = max(counts), max(counts.values())
    x = LinearScale((0.5, largest + 0.5), (_LEFT, _RIGHT))
    y = LinearScale((0, most), (_BOTTOM, _TOP))
    width = max(1.0, (x(2) - x(1)) * 0.8)
    for size, count in counts.items():
        picture.bar((x(size) - width / 2, y(count)), (width, _BOTTOM - y(count)), "a")
    step = max(1, math.ceil(largest / 8))
    for size in range(1, largest + 1, step):
        picture.text((x(size), _BOTTOM + 18), str(size), "small", "middle")
    for share in (0.5, 1.0):
        picture.line([(_LEFT, y(share * most)), (_RIGHT, y(share * most))], "rule")
        picture.text((_LEFT - 8, y(share * most) + 4), f"{share * most:.0f}", "small", "end")
    return picture.render()


def roofline(rows: Sequence[ResultRow]) -> str | None:
    """The attention kernels under the roofs of memory and tensor cores; None without rows of kernels."""
    newest = latest(row for row in rows if row.suite == "kernels" and row.tflops)
    series: list[tuple[str, Dtype, str, str]] = [
        ("fp16", "fp16", "a", "circle"),
        ("fp8 packed", "fp8", "c", "diamond"),
    ]
    marks = [
        (case.flops / case.bytes_moved(dtype), row.tflops, colour, shape)
        for variant, dtype, colour, shape in series
        for case in table_cases()
        if (row := newest.get((case.name, variant))) and row.tflops
    ]
    if not marks:
        return None
    low_x, low_y = 10.0, 10.0
    picture = frame("Roofline of the attention kernels", "TFLOP/s; blue fp16, orange fp8", "FLOP per byte")
    x, y = LogScale((low_x, 10_000), (_LEFT, _RIGHT)), LogScale((low_y, 2000), (_BOTTOM, _TOP))
    for value in (10, 100, 1000):
        picture.line([(_LEFT, y(value)), (_RIGHT, y(value))], "rule")
        picture.text((_LEFT - 8, y(value) + 4), f"{value}", "small", "end")
    for value in (10, 100, 1000, 10_000):
        picture.text((x(value), _BOTTOM + 18), f"{value}", "small", "middle")
    memory = MEMORY_BYTES_PER_S / 1e12
    roofs = {
        colour: gemm.tflops
        for _, dtype, colour, _ in series
        if (gemm := newest.get((GEMM_CASE, GEMM_NAMES[dtype]))) and gemm.tflops
    }
    picture.line([(x(low_x), y(low_x * memory)), (x(2000 / memory), y(2000))], "axis")
    picture.text((x(60), y(60 * memory) - 8), f"memory {memory:.2f} TB/s", "small", "end")
    for colour, ceiling in roofs.items():
        picture.line([(x(ceiling / memory), y(ceiling)), (_RIGHT, y(ceiling))], f"axis dashed {colour}")
        picture.text((_RIGHT, y(ceiling) - 4), f"GEMM {ceiling:.0f}", f"small {colour}", "end")
    for intensity, tflops, colour, shape in marks:
        picture.dot((x(intensity), y(tflops)), colour, shape)
    return picture.render()


def ratio_bars(rows: Sequence[ResultRow], reference: str) -> str:
    """How many times a reference's requests per second each row does."""
    height = 70 + 34 * len(rows)
    picture = frame("Beside PyTorch eager in Triton", f"requests per second, {reference} = 1", height=height)
    most = max(*(row.ratio_to[reference] for row in rows), 1.0)
    x = LinearScale((0, most), (16, _RIGHT - 60))
    for number, row in enumerate(rows):
        top = 66.0 + 34 * number
        picture.text((16, top), row.variant, "small")
        picture.bar((16, top + 5), (x(row.ratio_to[reference]) - 16, 13), "a")
        picture.text((x(row.ratio_to[reference]) + 6, top + 16), f"{row.ratio_to[reference]:.2f} x", "a")
        picture.line([(x(1), top + 3), (x(1), top + 20)], "axis dotted c")
    return picture.render()
