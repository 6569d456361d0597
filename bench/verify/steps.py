"""The steps of ``verify-tensorrt`` as data: a command each, what it needs, and the figure that it leaves."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.manifest import MANIFEST_NAME
from hstu_trt.contract.model_folder import TAPS
from hstu_trt.contract.tensors import FUSED, STAGES
from hstu_trt.engines.targets import TARGETS, find_target, target_of_device

ROOT = Path(__file__).resolve().parents[2]
_ARCHS = {"8.0": "80", "8.6": "80", "8.9": "89", "9.0": "90a", "10.0": "100a", "12.0": "120a"}
_STAGES = ",".join((*STAGES, FUSED, TAPS))


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The first GPU, as its driver names it."""

    name: str
    compute_capability: str
    """As in ``9.0``."""
    driver: str

    @property
    def target(self) -> str:
        """The name that ``hstu-trt engines --gpu`` takes. Raises ConfigError."""
        found = target_of_device(self.name)
        if found is None:
            raise ConfigError(f"{self.name} is none of the GPUs {', '.join(TARGETS)}; name the nearest with --gpu")
        return found.name

    @property
    def arch(self) -> str:
        """What the kernels are compiled for."""
        return _ARCHS.get(self.compute_capability, "all")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command, and what its outcome says."""

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    """Steps that must have passed."""
    figure: Callable[[], str] = str
    """What the step found, read from the files that it wrote; nothing by default."""
    result: Path | None = None
    """The file behind the figure, where an earlier run's must not be taken for this one's."""


def find_gpu() -> Gpu | None:
    """The GPU of this machine; None without one, or without its driver's tools."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    if not lines:
        return None
    name, capability, driver = (part.strip() for part in lines[0].split(","))
    return Gpu(name=name, compute_capability=capability, driver=driver)


def engine_precisions(target: str) -> list[str]:
    """What is verified on a target: fp16, and fp8 where there is hardware for it. Raises ConfigError for no target."""
    return [precision for precision in find_target(target).precisions if precision != "fp32"]


def steps(gpu: Gpu | None, target: str, precisions: Sequence[str], out: Path) -> list[Step]:
    """The steps for a target."""
    arch = gpu.arch if gpu else "all"
    plugins = Step(name="plugins", command=("make", "plugins", f"ARCHS={arch}"))
    headers = Step(
        name="headers",
        command=(sys.executable, "-m", "hstu_trt.plugins", "check", "--tensorrt", "--json"),
        needs=("plugins",),
    )
    exports = [Step(name=f"export {p}", command=_export(p, out)) for p in dict.fromkeys(("fp32", *precisions))]
    built = [_engines_step(target, p, out) for p in precisions]
    junit = out / "tests.xml"
    tests = Step(
        name="tests",
        command=(
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu or tensorrt",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={junit}",
            f"--gpu-target={target}",
        ),
        needs=("headers",),
        figure=lambda: count_tests(junit),
        result=junit,
    )
    return [plugins, headers, *exports, *built, tests, *(_diff_step(p, out) for p in precisions)]


def _room(*words: str | Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "hstu_trt.contract.cli", *map(str, words))


def _model(precision: str, out: Path) -> Path:
    return out / "onnx" / precision


def _engines(precision: str, out: Path) -> Path:
    return out / "engines" / precision


def _export(precision: str, out: Path) -> tuple[str, ...]:
    golden = ROOT / "tests" / "golden"
    source = ("--config", golden / "caseA" / "config.json", "--weights", golden / "ckptA", "--name", "demo")
    return _room("export", *source, "--max-history", "256", "--precision", precision, "--out", _model(precision, out))


def _engines_step(target: str, precision: str, out: Path) -> Step:
    folder = _engines(precision, out)
    options = ("--gpu", target, "--precision", precision, "--builder", "tensorrt", "--stages", _STAGES)
    return Step(
        name=f"engines {precision}",
        command=_room("engines", "--model", _model(precision, out), *options, "--out", folder),
        needs=("headers", f"export {precision}"),
        figure=lambda: engine_counts(folder),
    )


def _diff_step(precision: str, out: Path) -> Step:
    folder = out / "diff" / precision
    a = ("--model-a", _model("fp32", out), "--a", "torch")
    b = ("--model-b", _model(precision, out), "--b", "tensorrt", "--engines", _engines(precision, out))
    return Step(
        name=f"diff {precision}",
        command=_room("diff", *a, *b, "--out", folder),
        needs=("export fp32", f"engines {precision}"),
        figure=lambda: diff_figure(folder / "diff.json"),
        result=folder / "diff.json",
    )


def count_tests(junit: Path) -> str:
    """As in ``41 passed, 2 failed, 3 skipped``."""
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ET.parse(junit).getroot().iter("testsuite"):
        for key in totals:
            totals[key] += int(suite.get(key, 0))
    failed = totals["failures"] + totals["errors"]
    passed = totals["tests"] - failed - totals["skipped"]
    counts = [f"{passed} passed", *([f"{failed} failed"] if failed else [])]
    return ", ".join([*counts, *([f"{totals['skipped']} skipped"] if totals["skipped"] else [])])


def engine_counts(folder: Path) -> str:
    """As in ``5 engines, 12 plugin layers``."""
    stages = json.loads((folder / MANIFEST_NAME).read_text())["stages"]
    layers = sum(entry.get("details", {}).get("plugin_layers", 0) for entry in stages)
    return f"{len(stages)} engines, {layers} plugin layers"


def diff_figure(path: Path) -> str:
    """The largest difference of a score, with its tolerance."""
    (preds,) = (output for output in json.loads(path.read_text())["outputs"] if output["name"] == "preds")
    return f"scores within {preds['max_abs']:.1e} of {preds['tolerance']:g}"


def command_text(step: Step) -> str:
    """The command as a user types it, from the repository's root."""
    words = ["python" if word == sys.executable else word.replace(f"{ROOT}/", "") for word in step.command]
    if words[:3] == ["python", "-m", "hstu_trt.contract.cli"]:
        words[:3] = ["hstu-trt"]
    return shlex.join(words)
