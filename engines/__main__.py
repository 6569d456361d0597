"""``hstu-trt engines``: an exported model -> engines for a GPU, or for ONNX Runtime on the CPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import ConfigError, HstuTrtError
from hstu_trt.contract.text import names_in, number_in
from hstu_trt.engines.build import BUILDERS, CACHE, BuildPlan, build, make_plan, stages_up_to_date
from hstu_trt.engines.builders import COMPATIBILITIES, BuildOptions
from hstu_trt.engines.report import report, report_plan, report_targets
from hstu_trt.engines.targets import TARGETS


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 0, or raises an HstuTrtError."""
    options = _parser().parse_args(argv)
    if options.list:
        report_targets(options.json)
        return 0
    for name in ("model", "gpu", "precision", "out"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name} is missing (hstu-trt engines --list shows the GPUs)")
    plan = make_plan(
        options.model,
        options.gpu,
        options.precision,
        options.out,
        builder=options.builder,
        options=_build_options(options),
        cache=options.cache,
        quiet=False,
    )
    plan.builder.check(plan.request)
    if options.dry_run and not options.json:
        report_plan(plan)
        if (problem := _not_here(plan)) is not None:
            print(f"cannot be built on this machine: {problem}", file=sys.stderr)
            return 0
    plan.builder.check_machine(plan.request)
    stages, state = stages_up_to_date(plan), "up to date"
    if stages is None or options.force:
        stages, state = (None, "to be built") if options.dry_run else (build(plan, force=options.force), "built")
    report(plan, state, stages, options.json, options.memory)
    return 0


def _not_here(plan: BuildPlan) -> str | None:
    """What keeps this machine from building a plan whose options are right; None if nothing does."""
    try:
        plan.builder.check_machine(plan.request)
    except HstuTrtError as error:
        return str(error)
    return None


def _build_options(options: argparse.Namespace) -> BuildOptions:
    return BuildOptions(
        stages=options.stages,
        profiles=tuple(options.profile),
        plugins=not options.no_plugins,
        also=options.also,
        hardware_compat=options.hardware_compat,
        version_compatible=options.version_compatible,
        refit=options.refit,
        strip_plan=options.strip_plan,
        tf32=options.tf32,
        optimization_level=options.opt_level,
        workspace_mib=options.workspace_mib,
        max_table_mib=options.max_table_mib,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt engines", description=(__doc__ or "").replace("``", ""))
    parser.add_argument("--list", action="store_true", help="print the GPUs, their precisions and builders, and end")
    parser.add_argument("--model", type=Path, help="the model folder that hstu-trt export wrote")
    parser.add_argument("--gpu", metavar="NAME", help=f"target: {', '.join(TARGETS)}")
    parser.add_argument("--precision", metavar="P", help="fp32, fp16 or fp8, as the model was exported")
    parser.add_argument("--out", type=Path, help="the folder to make")
    parser.add_argument("--builder", choices=BUILDERS, help="default: the target's first")
    parser.add_argument("--stages", type=names_in, default=(), metavar="NAME,...", help="default: those of a request")
    parser.add_argument("--force", action="store_true", help="build again even when nothing changed")
    parser.add_argument("--dry-run", action="store_true", help="print plan and equivalent commands, write nothing")
    parser.add_argument("--memory", action="store_true", help="print what attention needs without and with the plugin")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    tuning = parser.add_argument_group("for builders tensorrt and tensorrt_rtx")
    tuning.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME[:dim=MIN/OPT/MAX,...]",
        help="an optimisation profile: single, batch, or own bounds of users, uih_tokens, candidates; may be repeated "
        "(default: single and batch)",
    )
    tuning.add_argument(
        "--cache",
        type=Path,
        default=CACHE,
        help="folder of timing caches and of engines by their key (default: %(default)s)",
    )
    tuning.add_argument(
        "--workspace-mib", type=partial(_whole_number, least=1), help="most scratch memory of an engine"
    )
    tuning.add_argument("--tf32", action="store_true", help="let fp32 products use TF32")
    tuning.add_argument("--also", type=names_in, default=(), metavar="GPU,...", help="tensorrt_rtx: in one engine")
    tuning.add_argument(
        "--max-table-mib",
        type=partial(_whole_number, least=0),
        default=BuildOptions.max_table_mib,
        help="without plugins: most MiB of tables in an engine (default: %(default)s)",
    )
    device = parser.add_argument_group("for builder tensorrt")
    device.add_argument("--no-plugins", action="store_true", help="function bodies in place of plugins, as a baseline")
    device.add_argument("--hardware-compat", choices=COMPATIBILITIES, default="none", help="run on other GPUs too")
    device.add_argument(
        "--version-compatible",
        action="store_true",
        help="run in later minor versions of TensorRT; such a plan holds host code: load it from trusted folders only",
    )
    device.add_argument("--refit", action="store_true", help="weights can be exchanged in the engine")
    device.add_argument("--strip-plan", action="store_true", help="leave weights out of the plan; the runner refits")
    device.add_argument("--opt-level", type=int, choices=range(6), help="builder optimisation level")
    return parser


def _whole_number(text: str, least: int) -> int:
    number = number_in(text)
    if number is None or number < least:
        raise argparse.ArgumentTypeError(f"must be a whole number >= {least}, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt engines"))
