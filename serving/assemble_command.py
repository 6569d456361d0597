"""``hstu-trt assemble``: the command line of ``assemble.py``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.manifest import MANIFEST_NAME
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.serving import pbtxt
from hstu_trt.serving.assemble import REPOSITORY, Options, assemble, fitted_configs
from hstu_trt.serving.cuda_steps import DEVICES, CudaSettings
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.models.waiting_room import BATCHED_PLACES, DEFAULT_PLACES
from hstu_trt.serving.refresh.settings import BAD_VERSIONS, DEFAULT_POLL_S, RefreshSettings
from hstu_trt.serving.served import SERVED, models_of, parse_served
from hstu_trt.serving.signature import FLAVOURS
from hstu_trt.serving.tier_report import memory_note
from hstu_trt.tables.ids import POLICIES
from hstu_trt.tables.refresh import REFRESH_MODES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt assemble", description="Put a Triton deployment together.")
    parser.add_argument("--model", type=Path, required=True, help="model folder, made by hstu-trt export")
    parser.add_argument("--flavour", choices=FLAVOURS, default="cpu", help="how the models run (default: cpu)")
    parser.add_argument(
        "--served", default=",".join(SERVED), metavar="NAMES",
        help=f"what requests may ask for, and no model beside it: {SERVED[0]}, {SERVED[1]} (default: both)",
    )  # fmt: skip
    parser.add_argument("--engines", type=Path, help="flavour tensorrt: folder made by hstu-trt engines")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cuda",
        help="flavour cuda: cpu is plain PyTorch, for tests (default: cuda)",
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=CudaSettings().batch_tokens, metavar="N",
        help="flavour cuda: tokens of a micro-batch (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--attention-norm", metavar="fixed:N", help="N of the attention's 1/N (default: max_seq_len)")
    parser.add_argument("--id-policy", choices=POLICIES, default="reject", help="ids outside a table (default: reject)")
    parser.add_argument(
        "--queue", type=int, metavar="N",
        help=f"requests that may wait, per model (default: {DEFAULT_PLACES}, {BATCHED_PLACES} for batches on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--tiers", type=Path, metavar="FILE", help="tiers of the tables, as tables.json says (default: mapped files)"
    )
    parser.add_argument("--tables", type=Path, metavar="DIR", help="folder of versions of the tables, watched")
    parser.add_argument(
        "--refresh", choices=REFRESH_MODES, default="auto", help="versions side by side or as overlays (default: auto)"
    )
    parser.add_argument(
        "--refresh-memory", type=float, metavar="GB", help="rows in memory, per process (default: free)"
    )
    parser.add_argument("--refresh-poll", type=float, default=DEFAULT_POLL_S, help="seconds between looks (default: 1)")
    parser.add_argument(
        "--bad-version", choices=BAD_VERSIONS, default="refuse",
        help="a start that cannot serve the version in use ends, or serves the one before it (default: refuse)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="deployment folder to write")
    parser.add_argument("--dry-run", action="store_true", help="print the difference to the repository, write nothing")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """The ``assemble`` verb."""
    args = _parser().parse_args(argv)
    refresh = RefreshSettings(
        tables=args.tables,
        mode=args.refresh,
        memory_bytes=None if args.refresh_memory is None else round(args.refresh_memory * 1e9),
        poll_s=args.refresh_poll,
        bad_version=args.bad_version,
    )
    options = Options(
        served=parse_served(args.served),
        flavour=args.flavour,
        engines=args.engines,
        attention_norm=args.attention_norm,
        id_policy=args.id_policy,
        queue=args.queue,
        tiers=args.tiers,
        refresh=refresh,
        cuda=CudaSettings(device=args.device, batch_tokens=args.batch_tokens),
    )
    model = read_model_folder(args.model)
    if args.dry_run:
        return _print_differences(model, options, as_json=args.json)
    deployment = assemble(model, args.out, options)
    if args.json:
        print(json.dumps(_summary(deployment)))
    else:
        _print_deployment(deployment, args.out)
    return 0


def _print_differences(model: ModelFolder, options: Options, *, as_json: bool) -> int:
    before = pbtxt.read_repository(REPOSITORY)
    fitted = fitted_configs(model, options)
    differences = {name: pbtxt.difference(name, before[name], config) for name, config in fitted.items()}
    print(json.dumps(differences) if as_json else "\n".join(filter(None, differences.values())))
    return 0


def _summary(deployment: Deployment) -> dict[str, Any]:
    return {
        "deployment": str(deployment.path),
        "manifest": str(deployment.path / MANIFEST_NAME),
        "served": list(deployment.served),
        "models": list(models_of(deployment.served)),
        "flavour": deployment.flavour,
        "attention_norm": deployment.attention_norm,
        "id_policy": deployment.id_policy,
        "model": deployment.model.name,
        "precision": deployment.model.precision,
    }


def _print_deployment(deployment: Deployment, out: Path) -> None:
    model = deployment.model
    print(f"assembled {out} ({deployment.flavour}) from {model.name} {model.precision}")
    print(f"  models          {', '.join(models_of(deployment.served))}")
    print(f"  memory          {memory_note(deployment)}")
    print(f"  attention norm  {deployment.attention_norm}")
    print(f"  ids             {deployment.id_policy} those outside a table")
    print(f"serve it with: hstu-trt serve --deployment {shlex.quote(os.path.relpath(out))}")


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt assemble"))
