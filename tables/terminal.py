"""What the verbs share: progress on stderr, NAME=VALUE options, tables of tables."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.stored_table import StoredTable
from hstu_trt.contract.text import bytes_text, text_table

DTYPES = {"float32": "float32", "float16": "float16", "int8": "int8", "fp8": "float8_e4m3fn"}
"""Dtypes of stored rows by their name on the command line."""

Verbs = Any
"""What ``add_subparsers`` returns; argparse does not name its type."""


def json_option() -> argparse.ArgumentParser:
    """A parent parser with ``--json``."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON instead of text")
    return shared


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` texts of an option that may be repeated -> name -> value. Raises ConfigError."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {text!r}: expected NAME=...")
        if name in found:
            raise ConfigError(f"{option} {text!r}: table {name!r} is given twice")
        found[name] = value
    return found


def whole(option: str, text: str, least: int = 0) -> int:
    """A whole number given to an option. Raises ConfigError."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{option} {text!r}: expected a whole number >= {least}")
    return number


def stored_row(table: StoredTable) -> dict[str, Any]:
    """A table as ``show`` lists it; what is as usual (ids that are rows, in any order) is left out."""
    row: dict[str, Any] = {
        "table": table.name,
        "rows": table.rows,
        "dim": table.dim,
        "dtype": table.dtype,
        "bytes": table.payload_bytes,
        "shards": len(table.shards),
        "features": list(table.features),
    }
    if table.ids.hash != "none":
        row["hash"] = table.ids.hash + (f":{table.ids.seed}" if table.ids.seed else "")
    if table.row_order != "identity":
        row["row_order"] = table.row_order
    if table.ids.default_row is not None:
        row["default_row"] = table.ids.default_row
    return row


def print_tables(rows: Sequence[dict[str, Any]], as_json: bool, facts: dict[str, Any] | None = None) -> None:
    """Prints rows as columns, sizes for people; or as JSON with further facts."""
    if as_json:
        print(json.dumps({**(facts or {}), "tables": rows}, indent=1))
        return
    header = list(dict.fromkeys(key for row in rows for key in row)) or ["table"]
    cells = [[_cell(key, row.get(key, "")) for key in header] for row in rows]
    print(text_table(["size" if name == "bytes" else name for name in header], cells))


def _cell(key: str, value: Any) -> Any:
    if key == "bytes":
        return bytes_text(value)
    return ", ".join(value) if isinstance(value, list) else value


class Progress:
    """A line on stderr every few seconds, none for short work."""

    def __init__(self, total: int, verb: str, every_s: float = 2.0) -> None:
        self.total, self.verb, self.every_s = total, verb, every_s
        self.done, self.printed = 0, 0
        self.started = self.last = time.monotonic()

    def add(self, what: str, size: int) -> None:
        """Counts ``size`` bytes of ``what`` as done."""
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
        """Prints the last line, if there was one before."""
        if self.printed:
            print(f"{self.verb} {bytes_text(self.done)}", file=sys.stderr, flush=True)
