"""What the verbs that show committed rows have in common: which files, and where the result goes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from hstu_trt.bench.arguments import suite_parser
from hstu_trt.bench.result_rows import RESULTS, ResultRow, read_rows
from hstu_trt.contract.manifest import write_text_atomically

Show = Callable[[Sequence[ResultRow]], str]
"""Rows -> Markdown, or an SVG."""


def print_rows(argv: Sequence[str], verb: str, summary: str | None, files: Sequence[str], show: Show) -> int:
    """Prints what ``show`` makes of rows. files: patterns of the default files in bench/results; returns 0."""
    print(show(_rows(_parser(verb, summary, files).parse_args(argv), files)))
    return 0


def draw_rows(argv: Sequence[str], verb: str, summary: str | None, files: Sequence[str], show: Show) -> int:
    """Writes what ``show`` makes of rows to ``--out``. files: as for ``print_rows``; returns 0."""
    parser = _parser(verb, summary, files)
    parser.add_argument("--out", type=Path, required=True, help="the .svg file")
    args = parser.parse_args(argv)
    write_text_atomically(args.out, show(_rows(args, files)))
    print(f"wrote {args.out}")
    return 0


def _parser(verb: str, summary: str | None, files: Sequence[str]) -> argparse.ArgumentParser:
    parser = suite_parser(verb, summary)
    text = f"files of rows (default: {', '.join(files)} in bench/results)"
    parser.add_argument("--rows", type=Path, nargs="+", help=text)
    return parser


def _rows(args: argparse.Namespace, files: Sequence[str]) -> list[ResultRow]:
    return read_rows(args.rows or sorted(path for pattern in files for path in RESULTS.glob(pattern)))
