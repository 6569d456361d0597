"""``hstu-trt bench compare A B``: rows before (A) and after (B) a change, and whether anything became slower.

A and B are files of rows, or commits, whose bench/results/ are read from git. Rows are paired by suite, case and
variant; of several with one name the newest counts. A change counts once it exceeds what the two rows' own repeats
spread, and at least a floor: twice the larger spread, or --floor. Exit code 1 for a regression, a missed gate or a run
that is no longer valid.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hstu_trt.bench.arguments import not_negative, suite_parser
from hstu_trt.bench.result_rows import ResultRow, git, latest, parse_rows, read_rows
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.text import text_table

GATE_EXIT_CODE = 1
FLOOR = 0.05
_SPREADS = 2.0
_WIDE = 0.5
"""A figure whose repeats differ by more decides nothing: it is said to be too noisy."""
_RESULTS = "bench/results"
HEADER = ("case", "variant", "figure", "A", "B", "better by", "allowed", "verdict")

Key = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of a row in A and in B."""

    case: str
    variant: str
    figure: str
    a: float
    b: float
    gain: float
    """Share by which B is better; negative: worse."""
    allowed: float
    """How much worse it may be."""
    verdict: str
    """``same``, ``better``, ``WORSE``, ``noisy``: worse, but within so wide a spread that it says nothing."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All changes, and what else is wrong with B."""

    changes: tuple[Change, ...]
    problems: tuple[str, ...]
    """Rows of B that miss a gate, or that were valid in A only."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    devices: tuple[str, str] | None
    """Set if A and B were measured on different devices, which decides nothing."""

    @property
    def worse(self) -> list[Change]:
        """The regressions."""
        return [change for change in self.changes if change.verdict == "WORSE"]

    @property
    def passed(self) -> bool:
        return not self.worse and not self.problems


def compare_rows(a: Sequence[ResultRow], b: Sequence[ResultRow], *, floor: float = FLOOR) -> Verdict:
    """The verdict on two sets of rows. Raises ConfigError if they have no row in common."""
    old, new = _newest(a), _newest(b)
    common = [key for key in new if key in old]
    if not common:
        raise ConfigError("A and B have no row in common: suite, case and variant must be the same")
    changes: list[Change] = []
    problems: list[str] = []
    for key in common:
        changes += _changes(old[key], new[key], floor)
        problems += _problems(old[key], new[key])
    devices = next(((old[key].device, new[key].device) for key in common if old[key].device != new[key].device), None)
    return Verdict(
        changes=tuple(changes),
        problems=tuple(problems),
        only_a=tuple(_text(key) for key in old if key not in new),
        only_b=tuple(_text(key) for key in new if key not in old),
        devices=devices,
    )


def _newest(rows: Sequence[ResultRow]) -> dict[Key, ResultRow]:
    suites = dict.fromkeys(row.suite for row in rows)
    return {(suite, *key): row for suite in suites for key, row in latest(r for r in rows if r.suite == suite).items()}


def _text(key: Key) -> str:
    return " / ".join(key)


def _changes(a: ResultRow, b: ResultRow, floor: float) -> list[Change]:
    """Median time of any row; of load runs p99 and requests per second too, where the load did not give the rate."""
    figures = {"median us": (a.median_us, b.median_us, max(a.spread, b.spread), False)}
    if "run" in a.details and "run" in b.details:
        spread = {
            name: max(row.details.get("spread", {}).get(name, 0.0) for row in (a, b)) for name in ("per_s", "p99")
        }
        p99 = [row.details["run"]["latency_ms"].get("p99") for row in (a, b)]
        if None not in p99:
            figures["p99 ms"] = (p99[0], p99[1], spread["p99"], False)
        if a.details.get("scenario") != "open" and a.per_s and b.per_s:
            figures["req/s"] = (a.per_s, b.per_s, spread["per_s"], True)
    return [_change(a, name, *figure, floor) for name, figure in figures.items()]


def _change(
    row: ResultRow, figure: str, a: float, b: float, spread: float, more_is_better: bool, floor: float
) -> Change:
    ratio = (b / a if more_is_better else a / b) if a and b else 1.0
    gain, allowed = ratio - 1.0, max(floor, _SPREADS * spread)
    if spread > _WIDE and gain < -floor:
        verdict = "noisy"
    elif ratio < 1.0 / (1.0 + allowed):
        verdict = "WORSE"
    else:
        verdict = "better" if gain > allowed else "same"
    return Change(
        case=row.case, variant=row.variant, figure=figure, a=a, b=b, gain=gain, allowed=allowed, verdict=verdict
    )


def _problems(a: ResultRow, b: ResultRow) -> list[str]:
    name, found = _text((b.suite, b.case, b.variant)), []
    if b.checks.get("gates_failed", 0.0):
        found.append(f"{name}: {b.checks['gates_failed']:.0f} gates of its scores are missed")
    if a.checks and not b.checks:
        found.append(f"{name}: has no checks any more")
    new_flags = set(b.details.get("flags", ())) - set(a.details.get("flags", ()))
    if new_flags and not a.details.get("flags"):
        found.append(f"{name}: was valid in A, in B: {', '.join(sorted(new_flags))}")
    return found


def read_side(source: str) -> list[ResultRow]:
    """The rows of a file, or of every file in bench/results/ at a commit. Raises ArtefactError."""
    path = Path(source)
    if path.is_file():
        return read_rows([path])
    if path.is_dir():
        return read_rows(sorted(path.glob("*.jsonl")))
    names = git("ls-tree", "--full-tree", "--name-only", f"{source}:./results", cwd=Path(__file__).parent)
    if names is None:
        raise ArtefactError(f"{source!r} is neither a file or folder of rows nor a commit with {_RESULTS}/")
    rows: list[ResultRow] = []
    for name in (name for name in names.splitlines() if name.endswith(".jsonl")):
        text = git("show", f"{source}:./results/{name}", cwd=Path(__file__).parent) or ""
        rows += parse_rows(text, f"{source}:{_RESULTS}/{name}")
    return rows


def text(verdict: Verdict, *, every: bool = False) -> str:
    """For people: what changed, or every figure."""
    shown = [change for change in verdict.changes if every or change.verdict != "same"]
    lines = [text_table(HEADER, [cells(change) for change in shown])] if shown else []
    lines += [f"A and B ran on different devices: {' and '.join(verdict.devices)}"] if verdict.devices else []
    lines += [f"PROBLEM: {problem}" for problem in verdict.problems]
    lines += [
        f"{len(only)} rows in {side} only" for side, only in (("A", verdict.only_a), ("B", verdict.only_b)) if only
    ]
    same = sum(change.verdict == "same" for change in verdict.changes)
    state = "no regression" if verdict.passed else f"REGRESSION: {len(verdict.worse)} figures worse"
    return "\n".join([*lines, f"{state}; {len(verdict.changes)} figures compared, {same} the same"])


def cells(change: Change) -> tuple[str, ...]:
    """A change under HEADER."""
    return (
        change.case, change.variant, change.figure, f"{change.a:.4g}", f"{change.b:.4g}", f"{change.gain:+.1%}",
        f"{change.allowed:.0%}", change.verdict,
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """The verb."""
    parser = suite_parser("compare", __doc__)
    parser.add_argument("a", metavar="A", help="rows before: a .jsonl file, a folder of them, or a commit")
    parser.add_argument("b", metavar="B", help="rows after")
    parser.add_argument("--suite", help="only rows of this suite")
    parser.add_argument("--floor", type=not_negative, default=FLOOR, help="smallest change that counts (default: 0.05)")
    parser.add_argument("--all", action="store_true", help="print unchanged figures, too")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    args = parser.parse_args(argv)
    a, b = ([row for row in read_side(side) if args.suite in (None, row.suite)] for side in (args.a, args.b))
    verdict = compare_rows(a, b, floor=args.floor)
    if args.json:
        print(json.dumps({"passed": verdict.passed, **asdict(verdict)}))
    else:
        print(text(verdict, every=args.all))
    return 0 if verdict.passed else GATE_EXIT_CODE
