"""``hstu-trt engines``: an exported model -> engines for a GPU, or for ONNX Runtime on the CPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.text import bytes_text, text_table
from hstu_trt.engines.build import BuildPlan, build, make_plan, stages_up_to_date
from hstu_trt.engines.builders import BuiltStage
from hstu_trt.engines.stages import engine_stages
from hstu_trt.engines.targets import TARGETS


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 0, or raises an HstuTrtError."""
    options = _parser().parse_args(argv)
    plan = make_plan(options.model, options.gpu, options.precision, options.out)
    stages, state = stages_up_to_date(plan), "up to date"
    if stages is None or options.force:
        stages, state = (None, "to be built") if options.dry_run else (build(plan), "built")
    _report(plan, state, stages, options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt engines", description=(__doc__ or "").replace("``", ""))
    parser.add_argument("--model", type=Path, required=True, help="the model folder that hstu-trt export wrote")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"target: {', '.join(TARGETS)}")
    parser.add_argument("--precision", required=True, metavar="P", help="fp32 or fp16, as the model was exported")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    parser.add_argument("--force", action="store_true", help="build again even when nothing changed")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _report(plan: BuildPlan, state: str, stages: Sequence[BuiltStage] | None, as_json: bool) -> None:
    if as_json:
        document = {
            "state": state,
            "out": str(plan.out),
            "target": plan.target.name,
            "builder": plan.builder.name,
            "precision": plan.model.precision,
            "digest": plan.digest,
            "stages": None if stages is None else [dataclasses.asdict(stage) for stage in stages],
        }
        print(json.dumps(document, indent=1))
        return
    if stages is not None:
        rows = [[one.stage, one.file, bytes_text(one.bytes), f"{one.load_s:.3f}"] for one in stages]
        print(text_table(["stage", "file", "size", "load s"], rows))
    else:
        print(f"stages: {', '.join(engine_stages(plan.model))}")
    print(f"{plan.out}: {state} ({plan.builder.name}, {plan.target.name}, {plan.model.precision})")


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt engines"))
