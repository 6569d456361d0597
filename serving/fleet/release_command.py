"""``hstu-trt release``: a new deployment for a running fleet, or the way back."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hstu_trt.contract.cli import run_verb
from hstu_trt.serving.fleet.command import DEFAULT_RUN
from hstu_trt.serving.fleet.control import ask
from hstu_trt.serving.served import parse_served


def main(argv: Sequence[str]) -> int:
    """The ``release`` verb: another deployment for a running fleet, or back to the one before."""
    parser = argparse.ArgumentParser(prog="hstu-trt release", description=main.__doc__)
    parser.add_argument("--fleet", type=Path, default=DEFAULT_RUN, help=f"folder of the fleet (default: {DEFAULT_RUN})")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--deployment", type=Path, help="the new deployment; engines and tables move together")
    what.add_argument("--rollback", action="store_true", help="back to the deployment before")
    what.add_argument("--retire", action="store_true", help="stop the replicas that are kept for a rollback")
    parser.add_argument("--golden", type=Path, help="requests (safetensors) that the new deployment has to score")
    parser.add_argument("--expected", type=Path, help="with --golden: their scores, as hstu-trt score writes them")
    parser.add_argument(
        "--drop", type=parse_served, default=(), metavar="NAME",
        help="with --deployment: what the fleet serves and the new one does not, since nobody asks for it any more",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if (args.golden is None) != (args.expected is None) or (args.golden and not args.deployment):
        parser.error("--golden and --expected belong together, and to --deployment")
    if args.drop and not args.deployment:
        parser.error("--drop goes with --deployment")
    command: dict[str, Any] = {"do": "rollback" if args.rollback else "retire"}
    if args.deployment:
        golden = [str(args.golden.resolve()), str(args.expected.resolve())] if args.golden else None
        deployment = str(args.deployment.resolve())
        command = {"do": "release", "deployment": deployment, "golden": golden, "drop": list(args.drop)}
    ask(args.fleet.resolve(), command, partial(print, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt release"))
