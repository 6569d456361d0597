"""``hstu-trt <verb>``: one command line, each verb a thin face of one room.

Rooms are imported only when their verb is called, so that ``hstu-trt --help`` needs no torch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from hstu_trt.contract.errors import HstuTrtError

# verb -> (module with main(argv) -> exit code, one line of help)
VERBS = {
    "export": ("hstu_trt.export.__main__", "checkpoint -> ONNX files and tables"),
    "engines": ("hstu_trt.engines.__main__", "ONNX files -> engines for a GPU or for ONNX Runtime"),
    "plugins": ("hstu_trt.plugins.__main__", "build the CUDA kernels, check and report what they take"),
    "tables": ("hstu_trt.tables.__main__", "make, check, quantise, plan and refresh embedding tables"),
    "score": ("hstu_trt.bench.score", "score an input file with one runner"),
    "diff": ("hstu_trt.bench.diff.verb", "compare two score files, tensor by tensor"),
    "assemble": ("hstu_trt.serving.assemble_command", "ONNX files + tables -> a Triton deployment"),
    "serve": ("hstu_trt.serving.serve", "launch Triton on a deployment"),
    "fleet": ("hstu_trt.serving.fleet.command", "several replicas behind a gateway, and commands to them"),
    "release": ("hstu_trt.serving.fleet.release_command", "a new deployment for a running fleet, and the way back"),
    "bench": ("hstu_trt.bench.__main__", "workloads, accuracy and benchmarks"),
}

INSTALL = "pip install 'hstu-trt[export,engines,serving,bench]'"
USAGE_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 130


def usage() -> str:
    """The help page."""
    lines = [f"  {verb:<10} {text}" for verb, (_, text) in VERBS.items()]
    return "usage: hstu-trt <verb> [options]     (hstu-trt <verb> --help tells more)\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code: 0 done, 1 a gate failed, 2 wrong input."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else USAGE_EXIT_CODE
    if args[0] == "--version":
        print(f"hstu-trt {importlib.metadata.version('hstu-trt')}")
        return 0
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        print(f"hstu-trt: unknown verb {verb!r}\n\n{usage()}", file=sys.stderr)
        return USAGE_EXIT_CODE

    def main_of_verb(argv: Sequence[str]) -> int:
        # Importing a room takes seconds, in which a user may press Ctrl-C too.
        code: int = importlib.import_module(VERBS[verb][0]).main(argv)
        return code

    return run_verb(main_of_verb, rest, f"hstu-trt {verb}")


def run_verb(main_function: Callable[[Sequence[str]], int], argv: Sequence[str], name: str) -> int:
    """Runs ``main(argv)`` and prints errors that a user can act on as one line instead of a traceback."""
    try:
        return main_function(argv)
    except HstuTrtError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # an unwritable --out, a full disk
        print(f"{name}: error: {error}", file=sys.stderr)
        return HstuTrtError.exit_code
    except ModuleNotFoundError as error:  # the contract needs numpy alone; each room brings packages of its own
        if (error.name or "hstu_trt").partition(".")[0] == "hstu_trt":
            raise
        print(f"{name}: error: Python package {error.name!r} is not installed: {INSTALL}", file=sys.stderr)
        return HstuTrtError.exit_code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
