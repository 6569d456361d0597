"""``tables delta make`` and ``tables delta apply``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_document
from hstu_trt.contract.stored_table import TablesFolder
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import DELTA_KIND, current_tables
from hstu_trt.contract.text import text_table
from hstu_trt.tables.convert import check_target
from hstu_trt.tables.delta import apply_delta, check_compatible, make_delta
from hstu_trt.tables.host import REGENERATE
from hstu_trt.tables.terminal import Progress, Verbs, json_option, print_tables, stored_row


def add_parsers(verbs: Verbs) -> None:
    """Adds the verbs' parsers."""
    text = "what changed between two versions, as a small folder"
    both = verbs.add_parser("delta", help=text, description=text).add_subparsers(required=True, metavar="make|apply")
    text = "write the rows that differ between two versions"
    one = both.add_parser("make", parents=[json_option()], help=text, description=text)
    one.add_argument("old", type=Path, help="the version before")
    one.add_argument("new", type=Path, help="the version after")
    one.add_argument("--out", type=Path, required=True, help="the delta to make")
    one.add_argument("--force", action="store_true", help="replace a delta that stands there")
    one.set_defaults(run=_make)
    text = "write the version that a delta leads to, bit by bit"
    one = both.add_parser("apply", parents=[json_option()], help=text, description=text)
    one.add_argument("old", type=Path, help="the version before")
    one.add_argument("delta", type=Path, help="what `make` wrote")
    one.add_argument("--out", type=Path, required=True, help="the tables folder to make")
    one.add_argument("--force", action="store_true", help="replace a tables folder that stands there")
    one.set_defaults(run=_apply)


def _open(folder: Path) -> TablesFolder:
    folder = current_tables(folder)
    return read_tables_folder(folder, regenerate=REGENERATE.format(folder=folder))


def _make(options: argparse.Namespace) -> int:
    old, new = _open(options.old), _open(options.new)
    check_compatible(old, new)
    _check_delta_target(options.out, options.force)
    progress = Progress(sum(table.payload_bytes for table in new.tables.values()), "compared")
    changed = make_delta(old, new, options.out, progress.add)
    progress.end()
    if options.json:
        print(json.dumps({"changed": changed}, indent=1))
        return 0
    cells = [
        [name, table.rows, changed[name], f"{changed[name] / max(1, table.rows):.3%}"]
        for name, table in new.tables.items()
    ]
    print(text_table(["table", "rows", "changed", "share"], cells))
    print(f"wrote {options.out}")
    return 0


def _check_delta_target(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise ConfigError(f"{out} exists; --force replaces it")
    try:
        read_document(out, kind=DELTA_KIND, regenerate="")
    except ArtefactError:
        raise ConfigError(f"{out} holds something else than a delta; choose another --out") from None


def _apply(options: argparse.Namespace) -> int:
    base = _open(options.old)
    needed = sum(table.payload_bytes for table in base.tables.values())
    check_target(options.out, needed, options.force)
    progress = Progress(needed, "written")
    made = apply_delta(base, options.delta, options.out, progress.add)
    progress.end()
    print_tables([stored_row(table) for table in made.tables.values()], options.json)
    if not options.json:
        print(f"wrote {options.out}")
    return 0
