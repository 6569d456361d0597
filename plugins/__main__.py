"""``hstu-trt plugins build|check|report|toolchain``: builds the CUDA kernels and tells what they take."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import GateError
from hstu_trt.contract.text import bytes_text
from hstu_trt.plugins.build import DEFAULT_ARCHS, HEADERS_KEY, BuildPlan, build, default_jobs, parse_archs, read_record
from hstu_trt.plugins.resources import faults, table
from hstu_trt.plugins.toolchain import find_toolchain
from hstu_trt.plugins.trt_library import check_headers, major


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 a compiler or the check failed, 2 something is missing or wrong."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    text = "Build the CUDA kernels; tell what they take."
    parser = argparse.ArgumentParser("hstu-trt plugins", description=text)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    sub = command("build", _build, "compile what has changed of the kernels and the TensorRT plugins into build/lib")
    sub.add_argument(
        "--archs", default=",".join(DEFAULT_ARCHS), help="compute capabilities, e.g. 80,90a, or all (%(default)s)"
    )
    sub.add_argument("--jobs", type=int, default=default_jobs(), help="compilers at a time (%(default)s)")
    sub.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    sub = command("check", _check, "fail if an sm90 kernel spills registers or loses performance as ptxas sees it")
    sub.add_argument(
        "--tensorrt", action="store_true", help="fail too if the plugins are not for the installed TensorRT"
    )
    command("report", _report, "registers, spills and shared memory of each kernel in the library")
    command("toolchain", _toolchain, "what the kernels would be built with")
    return parser


def _build(arguments: argparse.Namespace) -> int:
    plan = BuildPlan(find_toolchain(), parse_archs(arguments.archs), max(1, arguments.jobs))
    if arguments.dry_run:
        facts = plan.as_dict()
        print(json.dumps(facts, indent=1) if arguments.json else "\n".join(map(str, facts["commands"])))  # type: ignore[call-overload]
        return 0
    begin = time.monotonic()
    library = build(plan, quiet=arguments.json)
    seconds, size = time.monotonic() - begin, library.stat().st_size
    record, kernels, _ = read_record()
    if arguments.json:
        print(json.dumps({"library": str(library), "bytes": size, "seconds": round(seconds, 1), **record}))
        return 0
    print(f"\n{table(kernels)}\n")
    what = f"{bytes_text(size)} for {', '.join(plan.archs)}, CUDA {plan.toolchain.cuda}"
    print(f"{library}: {what}, in {seconds:.0f} s")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    record, kernels, notes = read_record()
    headers = str(record.get(HEADERS_KEY, ""))
    if arguments.tensorrt:
        check_headers()
    found = faults(kernels, notes) if kernels else ["the build left no report of any kernel: nothing was checked"]
    if arguments.json:
        print(json.dumps({"kernels": len(kernels), "faults": found, HEADERS_KEY: headers}))
    if found:
        raise GateError("kernels that must not lose performance do:\n  " + "\n  ".join(found))
    if not arguments.json:
        print(f"{len(kernels)} kernels: no spills and no performance notes where none may be")
        print(f"plugins for TensorRT {major(headers)}, headers of {headers}" if headers else "no plugins for TensorRT")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    record, kernels, notes = read_record()
    print(json.dumps(record, indent=1) if arguments.json else table(kernels))
    if not arguments.json:
        for note in notes:
            print(f"{note.source}: {note.text}")
    return 0


def _toolchain(arguments: argparse.Namespace) -> int:
    facts = {key: str(value) for key, value in dataclasses.asdict(find_toolchain()).items()}
    print(json.dumps(facts, indent=1) if arguments.json else "\n".join(f"{k:<12} {v}" for k, v in facts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt plugins"))
