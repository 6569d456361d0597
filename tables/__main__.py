"""``hstu-trt tables show|verify|convert``: look into, check and make folders of embedding tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import file_sha256, read_manifest
from hstu_trt.contract.table_format import TABLES_KIND, StoredTable, read_tables
from hstu_trt.contract.text import bytes_text, text_table
from hstu_trt.tables.convert import PlannedTable, check_target, convert, plan
from hstu_trt.tables.host import REGENERATE
from hstu_trt.tables.remote_verbs import add_remote_verbs


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 0, or raises an HstuTrtError."""
    options = _parser().parse_args(argv)
    done: int = options.run(options)
    return done


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt tables", description=(__doc__ or "").replace("``", ""))
    verbs = parser.add_subparsers(
        required=True, metavar="show|verify|convert|push|cluster-publish|cluster-retire|cluster-status"
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON instead of text")
    for verb, run, text in (
        ("show", _show, "list the tables of a folder"),
        ("verify", _verify, "hash every shard again; exit code 2 names the damaged ones"),
    ):
        one = verbs.add_parser(verb, parents=[shared], help=text, description=text)
        one.add_argument("folder", type=Path, help="the tables folder, e.g. MODEL/tables")
        one.set_defaults(run=run)
    text = "make a tables folder from matrices [rows, dim] in .npy or .safetensors files"
    one = verbs.add_parser("convert", parents=[shared], help=text, description=text)
    one.add_argument("--table", action="append", required=True, metavar="NAME=FILE[:TENSOR]", help="may be repeated")
    one.add_argument(
        "--features", action="append", default=[], metavar="NAME=F1,F2", help="features of a table (default: its name)"
    )
    one.add_argument("--dtype", choices=("float16", "float32"), help="of the stored rows (default: the source's)")
    one.add_argument("--shard-rows", type=int, help="rows per file (default: as many as fill 16 GiB)")
    one.add_argument("--out", type=Path, required=True, help="the folder to make")
    one.add_argument("--force", action="store_true", help="replace a tables folder that stands there")
    one.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    one.set_defaults(run=_convert)
    add_remote_verbs(verbs, shared, _Progress)
    return parser


def _show(options: argparse.Namespace) -> int:
    tables = read_tables(options.folder, regenerate=REGENERATE.format(folder=options.folder))
    _print_tables([_stored_row(table) for table in tables.values()], options.json)
    return 0


def _stored_row(table: StoredTable) -> dict[str, Any]:
    return {
        "table": table.name,
        "rows": table.rows,
        "dim": table.dim,
        "dtype": table.dtype,
        "bytes": table.rows * table.row_bytes,
        "shards": len(table.shards),
        "features": list(table.features),
    }


def _print_tables(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"tables": rows}, indent=1))
        return
    cells = [[*list(row.values())[:-1], ", ".join(row["features"])] for row in rows]
    for cell, row in zip(cells, rows, strict=True):
        cell[list(row).index("bytes")] = bytes_text(row["bytes"])
    header = list(rows[0]) if rows else ["table"]
    print(text_table(["size" if name == "bytes" else name for name in header], cells))


def _verify(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    regenerate = REGENERATE.format(folder=folder)
    tables = read_tables(folder, regenerate=regenerate)
    files = read_manifest(folder, kind=TABLES_KIND, regenerate=regenerate, verify=False)["files"]
    progress = _Progress(sum(entry["bytes"] for entry in files.values()), "hashed")
    damaged = []
    for file, entry in files.items():
        if file_sha256(folder / file, partial(progress.add, file)) != entry["sha256"]:
            damaged.append(file)
    progress.end()
    if options.json:
        print(json.dumps({"files": len(files), "bytes": progress.total, "damaged": damaged}, indent=1))
    if damaged:
        raise ArtefactError(
            f"{folder}: {', '.join(damaged)}: sha256 differs from the manifest; make it again with: {regenerate}"
        )
    if not options.json:
        print(f"{folder}: {len(tables)} tables, {len(files)} shards, {bytes_text(progress.total)}: all as written")
    return 0


def _convert(options: argparse.Namespace) -> int:
    features = {name: _features(name, text) for name, text in _pairs("--features", options.features).items()}
    tables = plan(_pairs("--table", options.table), features, options.dtype, options.shard_rows)
    check_target(options.out, tables, options.force)
    if not options.dry_run:
        progress = _Progress(sum(table.payload_bytes for table in tables), "written")
        convert(options.out, tables, progress.add)
        progress.end()
    _print_tables([_planned_row(table) for table in tables], options.json)
    if not options.json:
        print(f"would write {options.out}" if options.dry_run else f"wrote {options.out}")
    return 0


def _planned_row(table: PlannedTable) -> dict[str, Any]:
    config = table.config
    return {
        "table": config.name,
        "source": str(table.source.path),
        "source dtype": table.source.dtype,
        "rows": config.rows,
        "dim": config.dim,
        "dtype": config.dtype,
        "bytes": table.payload_bytes,
        "shards": table.shards,
        "features": list(config.features),
    }


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {text!r}: expected NAME=...")
        if name in pairs:
            raise ConfigError(f"{option} {text!r}: table {name!r} is given twice")
        pairs[name] = value
    return pairs


def _features(name: str, text: str) -> tuple[str, ...]:
    features = tuple(text.split(","))
    if "" in features or len(set(features)) != len(features):
        raise ConfigError(f"--features {name}={text}: a feature is empty or given twice")
    return features


class _Progress:
    """A line on stderr every few seconds, none for short work."""

    def __init__(self, total: int, verb: str, every_s: float = 2.0) -> None:
        self.total, self.verb, self.every_s = total, verb, every_s
        self.done, self.printed = 0, 0
        self.started = self.last = time.monotonic()

    def add(self, what: str, size: int) -> None:
        self.done += size
        now = time.monotonic()
        if now - self.last < self.every_s:
            return
        self.last, self.printed = now, self.printed + 1
        speed = self.done / (now - self.started)
        text = (
            f"{self.verb} {bytes_text(self.done)} of {bytes_text(self.total)} ({bytes_text(int(speed))}/s), at {what}"
        )
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.printed:
            print(f"{self.verb} {bytes_text(self.done)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt tables"))
