"""``hstu-trt bench report``: every result as one HTML file that loads nothing.

Reads the rows of bench/results/ (or --results). A load row without checks of its scores is refused: a fast wrong number
is no result. Of each served model, scenario and client the newest run counts; the comparison holds it against the run
before, or against --against. Every part says on which machine, when and at which commit it was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hstu_trt.bench import compare
from hstu_trt.bench.arguments import suite_parser
from hstu_trt.bench.report.cases import cases_of
from hstu_trt.bench.report.page import case_pictures, page
from hstu_trt.bench.result_rows import RESULTS, read_rows
from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import write_text_atomically


def main(argv: Sequence[str]) -> int:
    """The verb."""
    parser = suite_parser("report", __doc__)
    parser.add_argument("--results", type=Path, nargs="+", help="files of rows (default: all in bench/results/)")
    parser.add_argument(
        "--against", help="file, folder or commit to compare with (default: earlier rows of the same files)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/report/report.html"), help="(default: %(default)s)")
    parser.add_argument(
        "--pictures", type=Path, help="also write serving_curve.svg and serving_steps.svg to this folder"
    )
    args = parser.parse_args(argv)
    rows = read_rows(args.results or sorted(RESULTS.glob("*.jsonl")))
    write_text_atomically(args.out, page(rows, compare.read_side(args.against) if args.against else None))
    print(f"wrote {args.out}: {len(rows)} rows, {args.out.stat().st_size / 1024:.0f} KiB")
    if args.pictures is not None:
        cases = [case for case in cases_of(rows) if len(case.of("open")) > 1]
        if not cases:
            raise ArtefactError(
                "no case has a curve to draw: hstu-trt bench serve --scenarios single,offline,server,open"
            )
        for name, picture in zip(("serving_curve", "serving_steps"), case_pictures(cases[-1]), strict=False):
            write_text_atomically(args.pictures / f"{name}.svg", picture)
            print(f"wrote {args.pictures / f'{name}.svg'}")
    return 0
