"""``hstu-trt bench <suite>``: workloads and measurements."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hstu_trt.bench.generate import DEFAULT_SEED, generate_slots
from hstu_trt.bench.lengths import length_histogram
from hstu_trt.bench.profiles import PROFILES
from hstu_trt.contract.cli import USAGE_EXIT_CODE, run_verb
from hstu_trt.contract.config_json import load_config
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.tensors import Limits, default_limits
from hstu_trt.contract.text import bytes_text


def workload(argv: Sequence[str]) -> int:
    """Generates the requests of a profile, one .npz per time slot."""
    parser = argparse.ArgumentParser(prog="hstu-trt bench workload", description=workload.__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="ci")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="exported model: its tables bound the ids, its limits the rest")
    source.add_argument("--config", help="preset or config JSON with embedding_tables")
    parser.add_argument("--requests", type=int, help="at most this many requests (default: the profile's)")
    parser.add_argument("--timestamps", choices=("real", "ones"), default="real", help="ones: as in MLPerf's data")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--out", type=Path, required=True, help="folder for slot_<number>.npz")
    args = parser.parse_args(argv)
    config, limits = _model_limits(args.model) if args.model else _preset_limits(args.config)
    profile = PROFILES[args.profile]()
    if args.requests is not None:
        profile = dataclasses.replace(profile, requests=args.requests)
    lengths, size = [], 0
    for part in generate_slots(profile, config, seed=args.seed, timestamps=args.timestamps, limits=limits):
        path = args.out / f"slot_{part.key[0, 0]:03d}.npz"
        part.save(path)
        lengths.append(part.history_lengths)
        size += path.stat().st_size
    print(length_histogram(np.concatenate(lengths)))
    print(f"wrote {args.out}: {len(lengths)} file(s), {bytes_text(size)}, profile {args.profile}, seed {args.seed}")
    return 0


def _model_limits(path: Path) -> tuple[HstuConfig, Limits]:
    model = read_model_folder(path, verify=False)
    return model.ranking_config, model.limits


def _preset_limits(source: str) -> tuple[HstuConfig, Limits]:
    config = load_config(source)
    if not isinstance(config, HstuConfig):
        raise ConfigError(f"config {source} is a sequence encoder; a workload needs a ranking model (DlrmHSTU)")
    return config, default_limits(config)


def accuracy(argv: Sequence[str]) -> int:
    """PyTorch fp32 against ONNX Runtime fp32, fp16 and fp8."""
    from hstu_trt.bench.accuracy import main as run

    return run(argv)


def plan_precision(argv: Sequence[str]) -> int:
    """Which parts of a model may compute in fp8 under an accuracy budget."""
    from hstu_trt.bench.plan_precision import main as run

    return run(argv)


def demo(argv: Sequence[str]) -> int:
    """Checkpoint to ranked candidates on one machine."""
    from hstu_trt.bench.demo import main as run

    return run(argv)


def polygraphy(argv: Sequence[str]) -> int:
    """Valid inputs and shapes of a stage for Polygraphy's own command line."""
    from hstu_trt.bench.polygraphy_feeds import main as run

    return run(argv)


def kernels(argv: Sequence[str]) -> int:
    """Our attention kernels: checks them, then times them beside PyTorch on a CUDA GPU."""
    from hstu_trt.bench.kernels import main as run

    return run(argv)


def table_kernels(argv: Sequence[str]) -> int:
    """Prints the README's table from rows of kernels."""
    from hstu_trt.bench.kernels import table_main as run

    return run(argv)


def plot_kernels(argv: Sequence[str]) -> int:
    """Draws rows of kernels: TFLOP/s over history length, and a roofline."""
    from hstu_trt.bench.kernels import plot_main as run

    return run(argv)


def verify_tensorrt(argv: Sequence[str]) -> int:
    """Everything that needs TensorRT, on this machine's GPU; adds a row to the support matrix."""
    from hstu_trt.bench.verify import main as run

    return run(argv)


def model(argv: Sequence[str]) -> int:
    """The whole model in process on a CUDA GPU, beside PyTorch: checks its scores, then times it."""
    from hstu_trt.bench.model import main as run

    return run(argv)


def remote(argv: Sequence[str]) -> int:
    """Rows per second from a Redis Cluster on loopback, beside redis-py."""
    from hstu_trt.bench.remote import main as run

    return run(argv)


def table_support(argv: Sequence[str]) -> int:
    """Prints the support matrix from rows of verify-tensorrt."""
    from hstu_trt.bench.verify import table_main as run

    return run(argv)


def tables(argv: Sequence[str]) -> int:
    """Lookups of the host tier beside PyTorch's on a CPU."""
    from hstu_trt.bench.tables import main as run

    return run(argv)


SUITES: dict[str, Callable[[Sequence[str]], int]] = {
    "workload": workload,
    "accuracy": accuracy,
    "plan-precision": plan_precision,
    "demo": demo,
    "polygraphy": polygraphy,
    "kernels": kernels,
    "table-kernels": table_kernels,
    "plot-kernels": plot_kernels,
    "verify-tensorrt": verify_tensorrt,
    "table-support": table_support,
    "tables": tables,
    "model": model,
    "remote": remote,
}


def main(argv: Sequence[str]) -> int:
    """Dispatches to a suite."""
    if argv and argv[0] in SUITES:
        return SUITES[argv[0]](argv[1:])
    asked = bool(argv) and argv[0] in ("-h", "--help")
    lines = [f"  {name:<15} {suite.__doc__}" for name, suite in SUITES.items()]
    text = "usage: hstu-trt bench <suite> [options]     (hstu-trt bench <suite> --help tells more)\n\n" + "\n".join(
        lines
    )
    print(text, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else USAGE_EXIT_CODE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt bench"))
