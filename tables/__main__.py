"""``hstu-trt tables <verb>``: look into, check, make, shrink and refresh folders of embedding tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hstu_trt.contract.cli import run_verb
from hstu_trt.tables import remote_verbs, verb_convert, verb_delta, verb_plan, verb_quantise, verb_show, verb_verify


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 0, or raises an HstuTrtError."""
    parser = argparse.ArgumentParser(prog="hstu-trt tables", description=(__doc__ or "").replace("``", ""))
    verbs = parser.add_subparsers(required=True, metavar="show|verify|convert|quantise|...")
    for module in (verb_show, verb_verify, verb_convert, verb_quantise, verb_plan, verb_delta, remote_verbs):
        module.add_parsers(verbs)
    options = parser.parse_args(argv)
    done: int = options.run(options)
    return done


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt tables"))
