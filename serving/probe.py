"""A verdict on the server of this machine from what it answers, as an exit code: ``python -m hstu_trt.serving.probe``.

    0   all that is served answers, or turns the request away because there is too much to do: another server would not
        help
    1   a model does not, within the deadline

For Kubernetes and others that start a command to ask; Triton's own readiness says nothing of a model that died.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hstu_trt.contract.cli import run_verb
from hstu_trt.serving.answers import ServerError
from hstu_trt.serving.client import DEFAULT_URL, RankingClient, served_by
from hstu_trt.serving.supervision.canary import Canary, Reading
from hstu_trt.serving.tls import ClientTls, add_server_options, server_tls

DEFAULT_DEADLINE_S = 5.0


def ask(url: str, model: str, deadline_s: float, tls: ClientTls | None) -> Reading:
    """A canary of a model whose config the server tells. Raises ServerError where it tells none."""
    with RankingClient(url, model, timeout_s=deadline_s, tls=tls) as client:
        config, limits = client.config, client.limits
    # There is no earlier answer to hold this one against.
    with Canary(url, model, config, limits, 0.0, tls=tls) as canary:
        return canary.ask(deadline_s)


def main(argv: Sequence[str]) -> int:
    """Asks each served model once. With TLS it takes the files that ``serve`` was given."""
    parser = argparse.ArgumentParser(prog="python -m hstu_trt.serving.probe", description=main.__doc__)
    parser.add_argument("--url", default=DEFAULT_URL, help=f"host:port of the server's gRPC (default: {DEFAULT_URL})")
    parser.add_argument(
        "--deadline", type=float, default=DEFAULT_DEADLINE_S, help=f"seconds per model (default: {DEFAULT_DEADLINE_S})"
    )
    add_server_options(parser)
    args = parser.parse_args(argv)
    own = server_tls(args)
    tls = None if own is None else own.own_client()
    served = served_by(args.url, timeout_s=args.deadline, tls=tls)
    readings = [ask(args.url, model, args.deadline, tls) for model in served]
    if sick := [reading for reading in readings if not reading.verdict.is_healthy]:
        raise ServerError("; ".join(map(str, sick)))
    print("; ".join(map(str, readings)))
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "probe"))
