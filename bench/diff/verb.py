"""``hstu-trt diff A B``: compares two safetensors files, tensor by tensor.

``hstu-trt diff --model DIR --a RUNNER --b RUNNER --out DIR`` compares two runners; see ``runners.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hstu_trt.bench.files import read_tensors
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.numerics import Report, Tolerance, compare

GATE_EXIT_CODE = 1
_RUNNERS = (
    "Two runners instead of two files: hstu-trt diff --model DIR --a torch --b onnxruntime --out DIR (add --help)"
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one tensor differs: by its values, or because it cannot be compared."""

    name: str
    passed: bool
    problem: str = ""
    """Why there is no report: the tensor is in one file only, or the shapes differ."""
    report: Report | None = None

    def text(self) -> str:
        """One line for people."""
        shown = self.report.text() if self.report else f"{self.name}: {self.problem}"
        return f"{'ok  ' if self.passed else 'FAIL'} {shown}"

    def facts(self) -> dict[str, Any]:
        """The same as a JSON object."""
        measured = dataclasses.asdict(self.report) if self.report else {"problem": self.problem}
        return {**measured, "name": self.name, "passed": self.passed}


def diff(a: Mapping[str, NDArray], b: Mapping[str, NDArray], atol: float) -> list[Difference]:
    """Compares the tensors of two files by name; ``b`` is what is expected."""
    return [_difference(name, a.get(name), b.get(name), atol) for name in sorted({*a, *b})]


def _difference(name: str, a: NDArray | None, b: NDArray | None, atol: float) -> Difference:
    if a is None or b is None:
        return Difference(name=name, passed=False, problem="only in B" if a is None else "only in A")
    if a.shape != b.shape:
        return Difference(name=name, passed=False, problem=f"shape {list(a.shape)} in A, {list(b.shape)} in B")
    report = compare(name, a, b)
    return Difference(name=name, passed=report.passes(Tolerance(atol, "--atol")), report=report)


def main(argv: Sequence[str]) -> int:
    """Prints one line per tensor; exit code 1 if any is beyond ``--atol``, missing or of another shape."""
    if any(argument.startswith("--model") for argument in argv):
        from hstu_trt.bench.diff.runners import main as runners

        return runners(argv)
    parser = argparse.ArgumentParser(
        prog="hstu-trt diff", description=(__doc__ or "").partition("\n")[0], epilog=_RUNNERS
    )
    parser.add_argument("a", type=Path, help="safetensors file")
    parser.add_argument("b", type=Path, help="safetensors file with what is expected")
    parser.add_argument("--atol", type=float, default=0.0, help="largest accepted |difference| (default 0: equal)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    if not args.atol >= 0:
        raise ConfigError(f"--atol must be >= 0, got {args.atol}")
    differences = diff(read_tensors(args.a), read_tensors(args.b), args.atol)
    passed = all(difference.passed for difference in differences)
    if args.json:
        print(json.dumps({"passed": passed, "atol": args.atol, "tensors": [d.facts() for d in differences]}))
    else:
        print("\n".join(difference.text() for difference in differences))
        print(f"{sum(d.passed for d in differences)} of {len(differences)} tensors within {args.atol:g}")
    return 0 if passed else GATE_EXIT_CODE
