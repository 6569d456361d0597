"""``python -m hstu_trt.serving assemble|serve|fleet|release ...``: the verbs of this room."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hstu_trt.contract import cli

ROOM_VERBS = ("assemble", "serve", "fleet", "release")


def main(argv: Sequence[str]) -> int:
    """Runs one of the room's verbs and returns its exit code."""
    if argv and argv[0] in ROOM_VERBS:
        return cli.main(argv)
    print(f"usage: python -m hstu_trt.serving {'|'.join(ROOM_VERBS)} [options]", file=sys.stderr)
    return cli.USAGE_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
