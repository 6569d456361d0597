"""Types of arguments of several suites; a wrong one ends the command with exit code 2 and says what is wanted."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable
from typing import NoReturn

from hstu_trt.contract.errors import ConfigError


def _number(text: str, kind: type[int] | type[float], least: int, *, above: bool = False) -> float:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a {'whole ' * (kind is int)}number, got {text!r}") from None
    if not (value > least if above else value >= least) or math.isinf(value):
        raise argparse.ArgumentTypeError(f"must be {'>' if above else '>='} {least}, got {text}")
    return value


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In a sentence, as the project's other errors are told, without a screen of usage before it."""
        raise ConfigError(f"{message} ({self.prog} --help tells more)")


def suite_parser(suite: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of a suite's command line. text: a docstring, without its markup the description in ``--help``."""
    description = re.sub(r"^hstu-trt bench [^:]*: *", "", (text or "").replace("``", ""))
    return _Parser(prog=f"hstu-trt bench {suite}", description=description[:1].upper() + description[1:])


def count(text: str) -> int:
    """A whole number from 1 on."""
    return int(_number(text, int, 1))


def whole(text: str) -> int:
    """A whole number from 0 on, as a seed is."""
    return int(_number(text, int, 0))


def positive(text: str) -> float:
    """A finite number above 0."""
    return float(_number(text, float, 0, above=True))


def not_negative(text: str) -> float:
    """A finite number from 0 on."""
    return float(_number(text, float, 0))


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on with commas between; an empty text holds none."""
    return tuple(count(part) for part in text.split(",") if text)


def rates(text: str) -> tuple[float, ...]:
    """Numbers above 0 with commas between; an empty text holds none."""
    return tuple(positive(part) for part in text.split(",") if text)


def some_of(names: Iterable[str], what: str) -> Callable[[str], tuple[str, ...]]:
    """A reader of known names with commas between, at least one, each once; ``what`` they are, as in ``scenarios``."""
    known = tuple(names)

    def read(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        unknown = [name for name in found if name not in known]
        if unknown or not found:
            problem = f"unknown {what} {', '.join(unknown)}" if unknown else f"no {what}"
            raise argparse.ArgumentTypeError(f"{problem}: choose from {', '.join(known)}")
        return found

    return read
