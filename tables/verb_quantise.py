"""``tables quantise``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.shards import storage_dtype
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.contract.text import text_table
from hstu_trt.tables.convert import check_target
from hstu_trt.tables.host import REGENERATE
from hstu_trt.tables.quantise import QuantisationError, check_quantisable, measure_error, quantise_tables
from hstu_trt.tables.terminal import DTYPES, Progress, Verbs, json_option


def add_parsers(verbs: Verbs) -> None:
    """Adds the verb's parser."""
    text = "make int8 or fp8 rows with a scale each of a folder's float rows, and report the error"
    one = verbs.add_parser("quantise", parents=[json_option()], help=text, description=text)
    one.add_argument("folder", type=Path, help="the tables folder, e.g. MODEL/tables")
    one.add_argument("--to", choices=("int8", "fp8"), default="int8", help="int8 is the more exact one (default: int8)")
    one.add_argument("--table", action="append", metavar="NAME", help="may be repeated (default: every table)")
    one.add_argument("--out", type=Path, help="the folder to make; without it the error is only reported")
    one.add_argument("--force", action="store_true", help="replace a tables folder that stands there")
    one.set_defaults(run=_quantise)


def _quantise(options: argparse.Namespace) -> int:
    folder, dtype = current_tables(options.folder), DTYPES[options.to]
    source = read_tables_folder(folder, regenerate=REGENERATE.format(folder=folder))
    names = options.table or list(source.tables)
    for name in names:
        if name not in source.tables:
            raise ConfigError(f"no table {name!r} in {folder}; tables: {', '.join(source.tables)}")
    chosen = [source.tables[name] for name in names]
    check_quantisable(chosen)
    progress = Progress(sum(table.payload_bytes for table in chosen), "read")
    if options.out is None:
        reports = [measure_error(folder, table, dtype, progress.add) for table in chosen]
    else:
        row_bytes = storage_dtype(dtype).itemsize
        needed = sum(table.rows * (table.dim * row_bytes + 4) for table in chosen)
        needed += sum(table.payload_bytes for table in source.tables.values() if table.name not in names)
        check_target(options.out, needed, options.force)
        reports = quantise_tables(source, names, dtype, options.out, progress.add)
    progress.end()
    _print(reports, options)
    return 0


def _print(reports: list[QuantisationError], options: argparse.Namespace) -> None:
    rows = [
        {
            "table": report.table,
            "relative_rmse": report.relative_rmse,
            "max_abs_error": report.max_abs_error,
            "worst_row": report.worst_row,
            "worst_row_error": report.worst_row_error,
        }
        for report in reports
    ]
    if options.json:
        print(json.dumps({"to": options.to, "tables": rows}, indent=1))
        return
    cells = [
        [row["table"], f"{row['relative_rmse']:.3%}", f"{row['max_abs_error']:.3g}", row["worst_row"],
         f"{row['worst_row_error']:.3%}"] for row in rows
    ]  # fmt: skip
    print(text_table(["table", "relative RMSE", "largest error", "worst row", "its error"], cells))
    print(f"wrote {options.out}" if options.out else "nothing was written: --out FOLDER writes the tables")
