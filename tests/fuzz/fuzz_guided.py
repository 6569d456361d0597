"""Guided by coverage: atheris looks for damage that takes the readers down new paths, from the whole files on.

    python tests/fuzz/fuzz_guided.py --target 'model folder' --seconds 60

One target a process. What it finds is printed as the content of the file, and kept where --crashes says.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import atheris
from harness import Target, bound_resources, parser, read_damaged, whole_targets
from mutations import mutate

ROOMS = ["hstu_trt.contract", "hstu_trt.tables", "hstu_trt.export", "hstu_trt.engines", "hstu_trt.serving"]


def mutator(content: bytes, most: int, seed: int) -> bytes:
    """Half of the time damage that knows the format, else libFuzzer's own."""
    rng = random.Random(seed)
    changed = mutate(content, rng) if content and rng.random() < 0.5 else atheris.Mutate(content, most)
    return bytes(changed[:most])


def main() -> int:
    """Runs one target; exit code 1, or libFuzzer's, if a case went wrong."""
    options = parser(__doc__)
    options.add_argument("--crashes", type=Path, default=Path("build/fuzz_crashes"), help="folder of what went wrong")
    args = options.parse_args()
    with atheris.instrument_imports(include=ROOMS):
        import fuzz_loaders
        import fuzz_tables
    args.crashes.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root, found = Path(folder), list[Target]()
        for number, fuzzer in enumerate((fuzz_loaders, fuzz_tables)):
            found += whole_targets(fuzzer.targets, root / str(number), args.target)
        if len(found) != 1:
            names = ", ".join(repr(target.name) for target in found)
            print(f"--target must name one of: {names}", file=sys.stderr)
            return 2
        (root / "corpus").mkdir()
        (root / "corpus/whole").write_bytes(found[0].path.read_bytes())
        bound_resources()

        def one(content: bytes) -> None:
            if fault := read_damaged(found[0], content):
                raise AssertionError(fault)

        limits = [f"-max_total_time={max(1, round(args.seconds))}", "-timeout=25", "-rss_limit_mb=0", "-max_len=100000"]
        atheris.Setup(
            [sys.argv[0], *limits, f"-artifact_prefix={args.crashes}/", str(root / "corpus")],
            one, custom_mutator=mutator, internal_libfuzzer=True,
        )  # fmt: skip
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
