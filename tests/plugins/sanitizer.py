"""Small calls of every kernel under compute-sanitizer: python tests/plugins/sanitizer.py [--tools memcheck,racecheck]

Prints one line per tool. Exit codes: 0 clean, 1 the tool found something, 2 there is no compute-sanitizer or no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
TOOLS = ("memcheck", "racecheck")
SECONDS = 500
FOUND = 9


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("sanitizer", description="The kernels under compute-sanitizer.")
    parser.add_argument("--tools", default=",".join(TOOLS), help="of compute-sanitizer (%(default)s)")
    parser.add_argument("--kernels", default="sm90,clusters,smxx,fp32,embedding")
    parser.add_argument("--run", action="store_true", help="only run the calls, which is what the tools watch")
    arguments = parser.parse_args(argv)
    if arguments.run:
        return run_calls(arguments.kernels.split(","))
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("no compute-sanitizer: neither on PATH, in /usr/local/cuda nor in NVIDIA's wheels", file=sys.stderr)
        return 2
    return max(watch(sanitizer, tool, arguments.kernels) for tool in arguments.tools.split(","))


def find_sanitizer() -> Path | None:
    """The program of the toolkit, or of the wheel nvidia-cuda-sanitizer-api."""
    from hstu_trt.plugins.toolchain import SYSTEM_CUDA, wheel_roots

    if on_path := shutil.which("compute-sanitizer"):
        return Path(on_path)
    roots = [SYSTEM_CUDA, *wheel_roots()]
    places = [root / place / "compute-sanitizer" for root in roots for place in ("bin", "compute-sanitizer")]
    return next((place for place in places if place.is_file()), None)


def watch(sanitizer: Path, tool: str, kernels: str) -> int:
    """Runs the calls under one tool and prints how it went."""
    command = [
        str(sanitizer), "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5",
        "--kernel-regex", "kns=hstu_trt",
        sys.executable, __file__, "--run", "--kernels", kernels,
    ]  # fmt: skip
    # Each tensor its own allocation, so that a step outside of one is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.monotonic()
    try:
        result = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"{tool}: not done after {SECONDS} s")
        return 1
    lines = result.stdout.strip().splitlines()
    print(f"{tool}: {lines[-1] if lines else 'no output'} ({time.monotonic() - begin:.0f} s)")
    if result.returncode:
        print("\n".join(lines[:80]))
    return {0: 0, FOUND: 1}.get(result.returncode, 2)


def run_calls(kernels: Sequence[str]) -> int:
    """Runs every small case through the kernels that can do it."""
    sys.path.insert(0, str(SUPPORT))
    import torch

    if not torch.cuda.is_available():
        print("no CUDA GPU", file=sys.stderr)
        return 2
    from attention_calls import assemble
    from attention_cases import GpuBackend
    from attention_inputs import DTYPES, make_tokens

    from hstu_trt.plugins.attention import AttentionPlan, attention

    backend, runs = GpuBackend(), dict.fromkeys(kernels, 0)
    if "embedding" in runs:
        runs["embedding"] = run_lookups()
    for kernel in kernels:
        if kernel == "embedding":
            continue
        for case in cluster_cases() if kernel == "clusters" else small_cases():
            call = assemble(case, make_tokens(case, "cuda"), range(len(case.users)), backend.pack)
            name, output = "sm90" if kernel == "clusters" else kernel, DTYPES[case.output]
            if backend.unsupported(call, name, output) is None:
                plan = AttentionPlan()
                for _ in range(2):
                    attention(call, kernel=name, out=call.empty_output(output), plan=plan)
                runs[kernel] += 1
    torch.cuda.synchronize()
    print("calls: " + ", ".join(f"{kernel} {count}" for kernel, count in runs.items()))
    return 0


def run_lookups() -> int:
    """Lookups of all types: aligned and odd widths, cold rows, an overlay, several tables, live ones with a latch."""
    import numpy as np
    import torch

    from hstu_trt.plugins.embedding import LookupOptions, LookupReport, lookup_padded, lookup_tables
    from hstu_trt.plugins.embedding_tables import DeviceTable, LiveTables, Overlay

    ids, runs = torch.randint(-3, 90, (333, 2), device="cuda"), 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        scales = torch.rand(80, device="cuda") if dtype in (torch.int8, torch.float8_e4m3fn) else None
        for dim in (1, 20, 128, 512, 520):
            values = torch.randint(0, 100, (80, dim * dtype.itemsize), dtype=torch.uint8).view(dtype)
            overlay = Overlay.build(
                np.arange(0, 80, 9), values[:9].cuda(), None if scales is None else scales[:9].clone()
            )
            whole = DeviceTable(hot=values.cuda(), scales=scales, overlay=overlay)
            cold = DeviceTable(hot=values[:31].cuda(), cold=values[31:].clone().pin_memory(), scales=scales)
            report = LookupReport(
                status=torch.empty(ids.shape, dtype=torch.uint8, device="cuda"),
                bad_ids=torch.zeros(2, dtype=torch.int64, device="cuda"),
            )
            options = LookupOptions(policy="clamp", padding_id=-2, output_dtype=torch.float16)
            lookup_tables(ids, (whole, cold), options, report)
            live = LiveTables((whole, cold))
            lookup_tables(ids, live, options, report, latch=live.word.clone())
            lengths = torch.tensor([37, 0, 5, 1, 36, 2, 37, 9, 8], dtype=torch.int32, device="cuda")
            lookup_padded(ids[:, 0].reshape(9, 37), lengths, cold)
            runs += 3
    return runs


def small_cases() -> Iterator:
    """Each type and head dim plainly and with a window, behind a cache, long enough to be cut into parts."""
    from attention_inputs import Case, User

    from hstu_trt.plugins.parameters import AttentionOptions

    plain = (User(0, 130, 130, 33), User(0, 5, 5, 70), User(0, 0, 0, 3))
    cached = (User(150, 20, 20, 65), User(64, 0, 0, 7))
    long = (User(1300, 0, 0, 70),)
    windowed = AttentionOptions(0.1, max_attn_len=50, contextual_seq_len=3, min_full_attn_seq_len=9)
    for dtype in ("fp16", "bf16", "fp8"):
        for dim in (32, 64, 128, 256):
            size = {"qk_dim": dim, "v_dim": dim, "dtype": dtype, "layout": "uvqk"}
            yield Case(seed=dim, users=plain, options=AttentionOptions(0.1), **size)
            yield Case(seed=dim, users=plain, options=windowed, **size)
            for cache in ("contiguous", "paged"):
                yield Case(seed=dim, users=cached, options=AttentionOptions(0.1), cache=cache, slack=2, **size)
            yield Case(seed=dim, users=long, options=AttentionOptions(0.1), cache="contiguous", heads=1, **size)
        if dtype == "fp8":
            yield Case(seed=1, users=plain, options=AttentionOptions(0.1), dtype=dtype, packed_values=True)
    yield Case(seed=1, users=plain, options=AttentionOptions(0.1, candidate_group_size=4), bias=True)
    yield Case(seed=1, users=plain, options=AttentionOptions(0.1), dtype="fp32", output="fp32")


def cluster_cases() -> Iterator:
    """Few queries over a cache: as many items as clusters of 2 and of 8 CTAs are chosen for on an H100."""
    from attention_inputs import Case, User

    from hstu_trt.plugins.parameters import AttentionOptions

    # One has more rows than an item holds, so that some clusters have another one to do.
    few = tuple(User(90 * n, 0, 0, 300 if n == 5 else 7 * n) for n in range(16))
    for dtype in ("fp16", "bf16", "fp8"):
        for count in (16, 4):
            size = {"qk_dim": 128, "v_dim": 128, "dtype": dtype, "heads": 4, "cache": "contiguous"}
            yield Case(seed=count, users=few[-count:], options=AttentionOptions(0.1), **size)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
