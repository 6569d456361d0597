"""Tables as a picture: how often a part of a table answers, and rows per second of every tier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hstu_trt.bench.report.svg import LinearScale, LogScale, Picture
from hstu_trt.bench.result_rows import ResultRow, latest, sources
from hstu_trt.bench.tables.hit_rates import LAWS, ROWS, lru_rate, static_rate
from hstu_trt.bench.tables.report import TIERS, TierRows, shown_rows
from hstu_trt.contract.errors import ArtefactError

_WIDTH, _TOP, _BOTTOM = 1040, 92, 410
_PITCH = 22
_FRACTIONS = (1e-5, 1.0)
_COLOURS = ("n", "b", "a")
"""Of LAWS."""
_MOST_BARS = 22


def plot(rows: Sequence[ResultRow]) -> str:
    """The SVG of the newest rows. Raises ArtefactError where there is none to draw."""
    bars = _bars(rows)
    if not bars:
        raise ArtefactError("there are no rows to draw: `make bench-tables` measures them")
    height = max(_BOTTOM, _TOP + _PITCH * len(bars)) + 84
    picture = Picture(_WIDTH, height, "Hit rates of hot sets, and rows per second of each tier of embedding tables")
    _draw_hit_rates(picture)
    _draw_bars(picture, bars)
    found = [f"{device}, {day}, commit {commit[:12]}" for device, day, commit in sources(row for _, row, _ in bars)]
    for line in range(2):
        picture.text((24, height - 26 + 14 * line), "; ".join(found[line::2]), "small")
    return picture.render()


def _draw_hit_rates(picture: Picture) -> None:
    x, y = LogScale(_FRACTIONS, (70, 480)), LinearScale((0, 1), (_BOTTOM, _TOP))
    picture.text((24, 30), "How often a hot set answers", "title")
    picture.text((24, 48), f"table of {ROWS:.0e} rows; solid: static set of the most popular rows (the bound)", "small")
    picture.text((24, 63), "dashed: LRU cache of that size, computed", "small")
    for percent in range(0, 101, 20):
        picture.line([(70, y(percent / 100)), (480, y(percent / 100))], "rule")
        picture.text((62, y(percent / 100) + 4), f"{percent} %", "small", "end")
    for exponent in range(round(math.log10(_FRACTIONS[0])), 1):
        picture.text((x(10.0**exponent), _BOTTOM + 18), f"{10.0 ** (exponent + 2):g} %", "small", "middle")
    picture.text((275, _BOTTOM + 36), "part of the table", "small", "middle")
    fractions = np.geomspace(*_FRACTIONS, 60)
    for law, colour in zip(LAWS, _COLOURS, strict=True):
        for rate, style in ((static_rate, ""), (lru_rate, " dashed")):
            if rate is lru_rate and not law.exponent:
                continue  # both are the part itself
            points = [(x(f), y(rate(round(f * ROWS), ROWS, law.exponent))) for f in fractions]
            picture.line(points, f"line {colour}{style}")
        at = {0.0: 0.03, 0.8: 0.05, 1.05: 0.0003}[law.exponent]
        height = y(static_rate(round(at * ROWS), ROWS, law.exponent))
        picture.text((x(at) - 8, height - 6), law.name, f"small {colour}", "end")


def _bars(rows: Sequence[ResultRow]) -> list[tuple[TierRows, ResultRow, float]]:
    """Our rows with a rate, and the rate of the first reference that was measured beside each.

    Of the GPU, requests of DLRMv3's size in the plain variant: its table has many more.
    """
    newest = {(row.suite, row.case, row.variant): row for tier in TIERS for row in latest(_of(rows, tier)).values()}
    found = []
    for tier, row in shown_rows(rows):
        other = next((newest.get((row.suite, row.case, name)) for name in row.ratio_to), None)
        is_plain = tier.name != "GPU" or (row.variant == "EmbeddingLookup" and "9048" in row.case)
        if row.per_s and is_plain:
            found.append((tier, row, (other.per_s or 0.0) if other else 0.0))
    return found[:_MOST_BARS]


def _of(rows: Sequence[ResultRow], tier: TierRows) -> list[ResultRow]:
    return [row for row in rows if row.suite == tier.suite]


def _draw_bars(picture: Picture, bars: Sequence[tuple[TierRows, ResultRow, float]]) -> None:
    rates = [rate for _, row, other in bars for rate in (row.per_s or 0.0, other) if rate]
    low, high = (10.0 ** f(math.log10(v)) for f, v in ((math.floor, min(rates)), (math.ceil, max(rates))))
    x = LogScale((low, high), (770, 1000))
    bottom = _TOP + _PITCH * len(bars)
    picture.text((544, 30), "Rows per second", "title")
    picture.text((544, 48), "bar: ours; mark: what was measured beside it (docs/speed.md names it)", "small")
    for exponent in range(round(math.log10(low)), round(math.log10(high)) + 1):
        value = 10.0**exponent
        picture.line([(x(value), _TOP - 8), (x(value), bottom)], "rule")
        picture.text((x(value), bottom + 18), _rate_text(value), "small", "middle")
    colours = {tier.suite: colour for tier, colour in zip(TIERS, "abc", strict=True)}
    for number, (tier, row, other) in enumerate(bars):
        y = _TOP + _PITCH * number
        name = f"{tier.name}: {row.case}"
        picture.text((762, y + 11), name if len(name) <= 42 else name[:41] + "…", "small", "end")
        picture.bar((x(low), y + 2), (x(row.per_s or low) - x(low), 12), f"{colours[tier.suite]} faint")
        if other:
            picture.dot((x(other), y + 8), "n", "diamond")


def _rate_text(rate: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:g} {unit}"
    return f"{rate:g}"
