"""Plain text for people and from them: tables in columns, sizes, lists and numbers in options."""

from __future__ import annotations

import re
from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lines of columns under a header; numbers stand to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = [all(isinstance(row[column], (int, float)) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def names_in(text: str) -> tuple[str, ...]:
    """The names in a list with commas between, as options take them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def number_in(text: str) -> int | None:
    """The whole number >= 0 that an option holds; None for any other text, and for one beyond 64 bits."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def bytes_text(size: int) -> str:
    """A size for people, as in ``1.5 GiB``."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
