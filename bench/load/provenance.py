"""Where load rows were measured, and which file they go to."""

from __future__ import annotations

import os
from pathlib import Path

from hstu_trt.bench.load.machine_watch import gpu_description
from hstu_trt.bench.result_rows import RESULTS, Provenance, cpu_name, device_slug, package_versions


def device_here() -> str:
    """What rows name as the device: the GPU, or the CPU with its cores."""
    gpu = gpu_description()
    return gpu.partition(",")[0] if gpu else f"{cpu_name()}, {os.cpu_count()} CPUs"


def results_file(device: str) -> Path:
    """Where rows go by default."""
    return RESULTS / f"serve_{device_slug(device) if gpu_description() else 'cpu'}.jsonl"


def provenance_here(commit: str | None) -> Provenance:
    """Of rows that are measured now."""
    packages = ("torch", "onnxruntime", "tritonclient", "numpy", "grpcio", "nvidia-pytriton")
    return Provenance.here(device_here(), package_versions(packages), commit)
