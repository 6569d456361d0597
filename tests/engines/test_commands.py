"""The lines for trtexec and Polygraphy, and our own."""

from pathlib import Path

import pytest

from hstu_trt.engines.builders import BuildOptions
from hstu_trt.engines.commands import EngineInputs, equivalent_commands
from hstu_trt.engines.modules import TENSORRT, TENSORRT_RTX
from hstu_trt.engines.profiles import Profile

PROFILES = (
    Profile(name="single", dims={}, shapes={"x": ((0, 8), (4, 8), (4, 8)), "offsets": ((2,), (2,), (2,))}),
    Profile(name="batch", dims={}, shapes={"x": ((0, 8), (4, 8), (64, 8)), "offsets": ((2,), (3,), (9,))}),
)
EVERYTHING = BuildOptions(
    refit=True, strip_plan=True, version_compatible=True, tf32=True, hardware_compat="same_cc", optimization_level=4,
    workspace_mib=512,
)  # fmt: skip


def lines(flavour, options, plugins=True):
    inputs = EngineInputs(
        source=Path("m/hstu.onnx"),
        engine=Path("e/hstu.plan"),
        profiles=PROFILES,
        capabilities=(89, 120),
        has_plugins=plugins,
    )
    return equivalent_commands(flavour, options, inputs)


def test_trtexec():
    line, _ = lines(TENSORRT, BuildOptions())
    assert line == (
        "trtexec --onnx=m/hstu.onnx --saveEngine=e/hstu.plan --stronglyTyped --skipInference "
        "--dynamicPlugins=build/lib/libhstu_trt_plugins.so --profilingVerbosity=detailed --noTF32 "
        "--profile=0 --minShapes=x:0x8,offsets:2 --optShapes=x:4x8,offsets:2 --maxShapes=x:4x8,offsets:2 "
        "--profile=1 --minShapes=x:0x8,offsets:2 --optShapes=x:4x8,offsets:3 --maxShapes=x:64x8,offsets:9"
    )


def test_polygraphy():
    (line,) = lines(TENSORRT_RTX, BuildOptions(), plugins=False)
    assert line == (
        "POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy convert m/hstu.onnx --convert-to trt --strongly-typed "
        "--profiling-verbosity detailed --compute-capabilities 8.9 12.0 "
        "--trt-min-shapes 'x:[0,8]' 'offsets:[2]' --trt-opt-shapes 'x:[4,8]' 'offsets:[2]' "
        "--trt-max-shapes 'x:[4,8]' 'offsets:[2]' "
        "--trt-min-shapes 'x:[0,8]' 'offsets:[2]' --trt-opt-shapes 'x:[4,8]' 'offsets:[3]' "
        "--trt-max-shapes 'x:[64,8]' 'offsets:[9]' -o e/hstu.plan"
    )


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        (0, "--refit --stripWeights --versionCompatible --hardwareCompatibilityLevel=sameComputeCapability "
            "--builderOptimizationLevel=4 --memPoolSize=workspace:512M"),
        (1, "--refittable --strip-plan --version-compatible --hardware-compatibility-level same_compute_capability "
            "--builder-optimization-level 4 --pool-limit workspace:512M"),
    ],
)  # fmt: skip
def test_options(tool, options):
    line = lines(TENSORRT, EVERYTHING)[tool]
    assert options in line
    assert "noTF32" not in line
    assert ("--tf32" in line) == (tool == 1)


def test_polygraphy_knows_the_options(monkeypatch):
    """Every option of our line is one of the installed Polygraphy's."""
    from polygraphy.tools.convert import Convert

    tool, words = Convert(), lines(TENSORRT, EVERYTHING)[1].split()
    import argparse

    parser = argparse.ArgumentParser()
    tool.setup_parser(parser.add_subparsers())
    known = {option for action in _actions(parser) for option in action.option_strings}
    assert {word for word in words if word.startswith("--")} <= known


def _actions(parser):
    for action in parser._actions:
        yield action
        for sub in (getattr(action, "choices", None) or {}).values() if hasattr(action, "add_parser") else ():
            yield from _actions(sub)
