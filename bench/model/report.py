"""The page of figures' table of the whole model in process, from committed rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hstu_trt.bench.result_rows import ResultRow, latest, sources_text
from hstu_trt.bench.row_verbs import print_rows
from hstu_trt.bench.tables.report import ratio_text, us_text
from hstu_trt.contract.errors import ArtefactError

SUITE = "model"
FILES = ("model_*.jsonl",)
"""Files of rows in bench/results."""
BASELINES = ("torch eager", "torch.compile")
SHARE = "kernels_over_products_and_attention"
"""Check of a row: time of all kernels over that of products and attention alone."""


def model_table(rows: Iterable[ResultRow]) -> str:
    """Markdown: sources, and a line per case and variant of ours. Raises ArtefactError without rows."""
    newest = latest(row for row in rows if row.suite == SUITE)
    shown = [row for row in newest.values() if row.variant.startswith("cuda ")]
    if not shown:
        raise ArtefactError("there are no rows of the model: `make bench-model` measures them")
    lines = [
        "| case | variant | us a request | requests/s | TFLOP/s | p99 us | x eager | x compile | kernels / products "
        "and attention | rms error of logits |",
        "|---|---|" + "---:|" * 8,
    ]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in shown]
    return sources_text(shown) + "\n\n" + "\n".join(lines)


def _cells(row: ResultRow) -> list[str]:
    checks = row.checks
    return [
        row.case,
        f"`{row.variant.removeprefix('cuda ')}`",
        us_text(row.median_us),
        f"{row.per_s or 0:,.0f}",
        f"{row.tflops or 0:.0f}",
        us_text(checks["p99_us"]) if "p99_us" in checks else "",
        *(ratio_text(row.ratio_to[name]) if name in row.ratio_to else "" for name in BASELINES),
        f"{checks[SHARE]:.2f}" if SHARE in checks else "",
        f"{checks['logit_rms_error']:.1e} of {checks['logit_sd']:.2f}",
    ]


def table_main(argv: Sequence[str]) -> int:
    """Prints the table of the whole model from its rows."""
    return print_rows(argv, "table-model", table_main.__doc__, FILES, model_table)
