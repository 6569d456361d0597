"""``hstu-trt bench <suite>``: workloads and measurements."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from hstu_trt.contract.cli import USAGE_EXIT_CODE, run_verb


@dataclass(frozen=True)
class Suite:
    """One suite: what it does, and the module of this room, imported when it is called, that does it."""

    summary: str
    module: str
    function: str = "main"

    def __call__(self, argv: Sequence[str]) -> int:
        run = getattr(import_module(f"hstu_trt.bench.{self.module}"), self.function)
        return int(run(argv))


SUITES = {
    "workload": Suite("Generates the requests of a profile, one .npz per time slot.", "workloads.verb"),
    "accuracy": Suite("PyTorch fp32 against ONNX Runtime fp32, fp16 and fp8.", "accuracy.verb"),
    "gpu-accuracy": Suite("The cuda runner in fp16 and fp8 against PyTorch fp32 on a CUDA GPU.", "accuracy.gpu"),
    "plan-precision": Suite(
        "Which parts of a model may compute in fp8 under an accuracy budget.", "accuracy.plan_precision"
    ),
    "demo": Suite("Checkpoint to ranked candidates on one machine.", "demo"),
    "polygraphy": Suite("Valid inputs and shapes of a stage for Polygraphy's own command line.", "polygraphy_feeds"),
    "kernels": Suite(
        "Our attention kernels: checks them, then times them beside PyTorch on a CUDA GPU.", "kernels.verb"
    ),
    "table-kernels": Suite("Prints the table of docs/speed.md from rows of kernels.", "kernels.verb", "table_main"),
    "table-attention": Suite("Prints the README's table from rows of kernels.", "kernels.verb", "readme_main"),
    "plot-kernels": Suite(
        "Draws rows of kernels: TFLOP/s over history length, and a roofline.", "kernels.verb", "plot_main"
    ),
    "verify-tensorrt": Suite(
        "Everything that needs TensorRT, on this machine's GPU; adds a row to the support matrix.", "verify.verb"
    ),
    "table-support": Suite("Prints the support matrix from rows of verify-tensorrt.", "verify.verb", "table_main"),
    "model": Suite(
        "The whole model in process on a CUDA GPU, beside PyTorch: checks its scores, then times it.", "model.verb"
    ),
    "table-model": Suite("Prints the table of the whole model from its rows.", "model.report", "table_main"),
    "tables": Suite("Lookups of the host tier beside PyTorch's on a CPU.", "tables.host"),
    "tables-gpu": Suite("Lookups on a CUDA GPU, in its memory and over the bus, beside PyTorch's.", "tables.gpu"),
    "remote": Suite("Rows per second from a Redis Cluster on loopback, beside redis-py.", "tables.remote"),
    "refresh": Suite("Tables and dense weights replaced in a running server under load.", "tables.refresh"),
    "table-lookups": Suite(
        "Prints the section of docs/speed.md on embedding tables from rows of every tier.",
        "tables.report",
        "table_main",
    ),
    "plot-lookups": Suite(
        "Draws hit rates of hot sets, and rows per second of every tier of tables.", "tables.report", "plot_main"
    ),
    "serve": Suite(
        "A deployment under load: offline, server at a bound, single, curves of latency over throughput.",
        "serving.serve",
    ),
    "overload": Suite(
        "A deployment under more load than it can serve: what it refuses, and how fast.", "serving.overload"
    ),
    "soak": Suite("A deployment under load for long: memory, handles, threads must not grow.", "serving.soak"),
    "in-process": Suite("The same load on an engine in this process.", "serving.in_process"),
    "perf": Suite("A deployment under perf_analyzer's load, beside our own client.", "serving.perf"),
    "side-by-side": Suite(
        "Our deployment beside PyTorch eager in a Triton Python backend, in turn.", "serving.side_by_side"
    ),
    "fuzz": Suite(
        "Bad input to a deployment over gRPC, by a seed: every answer right or a clear refusal.", "fuzz.verb"
    ),
    "compare": Suite("Rows before and after a change: what became slower.", "compare"),
    "plan": Suite(
        "Machines, memory and cost for a rate, a table and a bound on latency, from measured rows.", "plan.verb"
    ),
    "report": Suite("All results as one HTML page.", "report.verb"),
}


def main(argv: Sequence[str]) -> int:
    """Dispatches to a suite."""
    if argv and argv[0] in SUITES:
        # A terminated run must stop its servers, too: the interrupt unwinds through the code that drains them.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return SUITES[argv[0]](argv[1:])
    asked = bool(argv) and argv[0] in ("-h", "--help")
    lines = [f"  {name:<15} {suite.summary}" for name, suite in SUITES.items()]
    text = "usage: hstu-trt bench <suite> [options]     (hstu-trt bench <suite> --help tells more)\n\n" + "\n".join(
        lines
    )
    print(text, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else USAGE_EXIT_CODE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt bench"))
