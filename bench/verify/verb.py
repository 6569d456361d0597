"""``hstu-trt bench verify-tensorrt``: everything that needs TensorRT, on the GPU of this machine, in one command.

Builds plugins and engines, runs the tests marked ``gpu`` and ``tensorrt``, compares the engines with PyTorch, and adds
a row to the support matrix. Each step is a command that can be run alone; a step whose need failed is skipped.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hstu_trt.bench.arguments import some_of, suite_parser
from hstu_trt.bench.result_rows import Provenance, package_versions
from hstu_trt.bench.verify.steps import ROOT, Gpu, Step, command_text, engine_precisions, find_gpu, steps
from hstu_trt.bench.verify.support_rows import SUPPORT, StepResult, SupportRow, append_row, markdown, read_support
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.plugins.trt_library import check_headers, headers_version

GATE_EXIT_CODE = 1
_TAIL_LINES = 25

Run = Callable[[Sequence[str], Path], int]


def missing_parts(gpu: Gpu | None) -> list[str]:
    """What this machine lacks, with what to do about it."""
    missing = []
    if gpu is None:
        missing.append("no CUDA GPU: nvidia-smi names none")
    elif not _sees_cuda():
        missing.append("PyTorch sees no CUDA GPU: install its build for CUDA in place of the one for CPUs")
    if importlib.util.find_spec("tensorrt") is None:
        missing.append(
            "no TensorRT: the Python module 'tensorrt' is missing (pip install tensorrt, or docker/Dockerfile)"
        )
    elif problem := _other_headers():
        missing.append(problem)
    return missing


def _other_headers() -> str | None:
    """Why plugins that are already built do not fit the installed TensorRT; None if they do, or will be built."""
    try:
        check_headers()
    except ArtefactError as error:
        return str(error) if headers_version() else None
    return None


def _sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run_command(command: Sequence[str], log: Path) -> int:
    """Runs a command with its output in ``log``; the end of it is shown if it fails."""
    with log.open("w") as stream:
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode
    if code:
        print("\n".join(log.read_text().splitlines()[-_TAIL_LINES:]), file=sys.stderr)
    return code


def run_steps(plan: Sequence[Step], out: Path, run: Run = run_command) -> list[StepResult]:
    """Runs the steps in their order."""
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, StepResult] = {}
    for number, step in enumerate(plan, 1):
        print(f"[{number}/{len(plan)}] {step.name}: {command_text(step)}", flush=True)
        results[step.name] = _run_step(step, out / f"{step.name.replace(' ', '-')}.log", results, run)
        print(f"      {results[step.name].cell}, {results[step.name].seconds:.0f} s", flush=True)
    return list(results.values())


def _run_step(step: Step, log: Path, earlier: Mapping[str, StepResult], run: Run) -> StepResult:
    broken = [name for name in step.needs if earlier[name].status != "passed"]
    if broken:
        return StepResult(name=step.name, status="skipped", figure=f"after {broken[0]}")
    if step.result is not None:
        step.result.unlink(missing_ok=True)
    began = time.monotonic()
    code = run(step.command, log)
    seconds = round(time.monotonic() - began, 1)
    try:
        figure = step.figure()
    except (OSError, ValueError, KeyError, ET.ParseError) as error:
        figure = f"left no figure: {type(error).__name__}"
    return StepResult(name=step.name, status="failed" if code else "passed", seconds=seconds, figure=figure)


def main(argv: Sequence[str]) -> int:
    """Exit code 0 if every step passed, 1 if one failed, 2 where something is missing."""
    args = _parser().parse_args(argv)
    gpu = find_gpu()
    missing = missing_parts(gpu)
    if args.dry_run:
        target = args.gpu or (gpu.target if gpu else "h100")
        for step in steps(gpu, target, args.precisions or engine_precisions(target), args.work):
            print(f"{step.name}: {command_text(step)}")
        print("\n".join(f"missing here: {part}" for part in missing) or "nothing is missing here")
        return 0
    if gpu is None or missing:
        raise ConfigError("this machine cannot verify TensorRT:\n  " + "\n  ".join(missing))
    target = args.gpu or gpu.target
    results = run_steps(steps(gpu, target, args.precisions or engine_precisions(target), args.work), args.work)
    origin = Provenance.here(gpu.name, _versions(gpu))
    row = SupportRow(**vars(origin), compute_capability=gpu.compute_capability, steps=tuple(results))
    append_row(args.rows, row)
    print(f"\n{markdown([row])}\nadded to {args.rows}; logs in {args.work}")
    return 0 if row.passed else GATE_EXIT_CODE


def _versions(gpu: Gpu) -> dict[str, str]:
    tensorrt = importlib.import_module("tensorrt")
    found = package_versions(("torch", "onnxruntime", "polygraphy"))
    return found | {"tensorrt": str(tensorrt.__version__), "driver": gpu.driver}


def _parser() -> argparse.ArgumentParser:
    parser = suite_parser("verify-tensorrt", __doc__)
    parser.add_argument("--gpu", metavar="NAME", help="target of the engines (default: this GPU)")
    parser.add_argument(
        "--precisions",
        type=some_of(("fp16", "fp8"), "precisions"),
        help="default: fp16,fp8, without fp8 before compute capability 8.9",
    )
    parser.add_argument("--work", type=Path, default=Path("build/verify"), help="artefacts and logs (%(default)s)")
    parser.add_argument("--rows", type=Path, default=SUPPORT, help="file that the row is added to (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the steps and what is missing, run nothing")
    return parser


def table_main(argv: Sequence[str]) -> int:
    """Prints the support matrix of the rows."""
    parser = suite_parser("table-support", table_main.__doc__)
    parser.add_argument("--rows", type=Path, default=SUPPORT, help="(%(default)s)")
    print(markdown(read_support(parser.parse_args(argv).rows)))
    return 0
