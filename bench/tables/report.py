"""The section of docs/speed.md on tables: lookups of every tier, hit rates, refreshes; from committed rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hstu_trt.bench.result_rows import ResultRow, latest, sources_text
from hstu_trt.bench.row_verbs import draw_rows, print_rows
from hstu_trt.bench.tables.hit_rates import LAWS, ROWS, SHARES, lru_rate, static_rate
from hstu_trt.contract.errors import ArtefactError

FILES = ("tables_*.jsonl", "remote_*.jsonl", "refresh_*.jsonl")
"""Files of rows in bench/results."""
REFRESH = "refresh"
PREDICTED = "to_predicted"
"""Check of a row of a hot set: its time over hit rate x time of hits + miss rate x time of misses."""


@dataclass(frozen=True)
class TierRows:
    """The rows of one suite, as the section shows them."""

    suite: str
    name: str
    is_ours: Callable[[str], bool]
    """Of a variant: whether it has a line of its own; the others are what it is compared with."""


TIERS = (
    TierRows("tables gpu", "GPU", lambda variant: variant.startswith("EmbeddingLookup")),
    TierRows("tables cpu", "host", lambda variant: variant == "host tier"),
    TierRows("remote", "remote", lambda variant: variant == "hstu-trt"),
)


def shown_rows(rows: Iterable[ResultRow]) -> list[tuple[TierRows, ResultRow]]:
    """Our newest rows, tier by tier, in the order in which they were measured."""
    rows = list(rows)
    found = []
    for tier in TIERS:
        newest = latest(row for row in rows if row.suite == tier.suite)
        found += [(tier, row) for row in newest.values() if tier.is_ours(row.variant)]
    return found


def page_section(rows: Sequence[ResultRow]) -> str:
    """Markdown: sources, lookups, hit rates, and refreshes if there are any. Raises ArtefactError without rows."""
    shown = shown_rows(rows)
    if not shown:
        raise ArtefactError("there are no rows of tables: `make bench-tables` measures them")
    refreshes = list(latest(row for row in rows if row.suite.startswith(REFRESH)).values())
    parts = [sources_text([row for _, row in shown] + refreshes), _lookups(shown), _HIT_RATES, _hit_rates()]
    if refreshes:
        parts += [_REFRESHES, _refreshes(refreshes)]
    return "\n\n".join(parts)


_HIT_RATES = (
    f"How often a part of a table with {ROWS:.0e} rows answers: a static set of the most popular rows, which is the "
    "bound, and in brackets an LRU cache of the same size (computed)."
)
_REFRESHES = "Versions that change under load:"


def _lookups(shown: Sequence[tuple[TierRows, ResultRow]]) -> str:
    lines = [
        "| tier | lookup | variant | us | spread | M rows/s | GB/s | times as fast as |",
        "|---|---|---|" + "---:|" * 4 + "---|",
    ]
    for tier, row in shown:
        ratios = ", ".join(f"{name} {ratio_text(ratio)}" for name, ratio in row.ratio_to.items())
        if PREDICTED in row.checks:
            ratios = f"(takes {row.checks[PREDICTED]:.2f} times what hits and misses alone predict)"
        per_s, gbps = f"{(row.per_s or 0) / 1e6:.2f}", f"{row.gbps or 0:.1f}"
        cells = (
            tier.name,
            row.case,
            f"`{row.variant}`",
            us_text(row.median_us),
            f"{row.spread:.0%}",
            per_s,
            gbps,
            ratios,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _hit_rates() -> str:
    header = "| law | " + " | ".join(f"{share:.2%}".rstrip("0%").rstrip(".") + " %" for share in SHARES) + " |"
    lines = [header, "|---|" + "---:|" * len(SHARES)]
    for law in LAWS:
        cells = []
        for share in SHARES:
            cached = round(share * ROWS)
            static, lru = static_rate(cached, ROWS, law.exponent), lru_rate(cached, ROWS, law.exponent)
            cells.append(f"{100 * static:.3g} % ({100 * lru:.3g})")
        lines.append(f"| {law.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _refreshes(rows: Sequence[ResultRow]) -> str:
    lines = ["| what | variant | median us | checks |", "|---|---|---:|---|"]
    for row in rows:
        checks = ", ".join(f"{name} {value:.4g}" for name, value in row.checks.items())
        lines.append(f"| {row.case} | {row.variant} | {us_text(row.median_us)} | {checks} |")
    return "\n".join(lines)


def us_text(microseconds: float) -> str:
    """A time of three digits or more."""
    return f"{microseconds:,.{1 if microseconds < 100 else 0}f}"


def ratio_text(ratio: float) -> str:
    """Of two or three digits."""
    return f"{ratio:.{1 if ratio >= 10 else 2}f}"


def table_main(argv: Sequence[str]) -> int:
    """Prints the section of docs/speed.md on tables from rows of all tiers."""
    return print_rows(argv, "table-lookups", table_main.__doc__, FILES, page_section)


def plot_main(argv: Sequence[str]) -> int:
    """Draws hit rates and the rates of all tiers."""
    from hstu_trt.bench.tables.plot import plot

    return draw_rows(argv, "plot-lookups", plot_main.__doc__, FILES, plot)
