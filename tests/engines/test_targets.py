"""The table of GPUs, and which device is which."""

import json

import pytest

from hstu_trt.contract.cli import main as command_line
from hstu_trt.contract.errors import ConfigError
from hstu_trt.engines.targets import TARGETS, capability_text, find_target, target_of_device

CAPABILITIES = {
    "cpu": 0, "t4": 75, "a10": 86, "a100": 80, "l4": 89, "l20": 89, "l40s": 89, "rtx4090": 89, "h100": 90, "h200": 90,
    "b200": 100, "rtxpro6000": 120,
}  # fmt: skip
DEVICES = {
    "Tesla T4": ["t4"],
    "NVIDIA A10": ["a10"],
    "NVIDIA A100-SXM4-80GB": ["a100"],
    "NVIDIA A100 80GB PCIe": ["a100"],
    "NVIDIA L4": ["l4"],
    "NVIDIA L20": ["l20"],
    "NVIDIA L40S": ["l40s"],
    "NVIDIA GeForce RTX 4090": ["rtx4090"],
    "NVIDIA H100 80GB HBM3": ["h100"],
    "NVIDIA H200": ["h200"],
    "NVIDIA B200": ["b200"],
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": ["rtxpro6000"],
    "NVIDIA RTX 6000 Ada Generation": [],
    "NVIDIA L40": [],
    "NVIDIA A10G": [],
    "NVIDIA GH200 480GB": [],
}


def test_capabilities():
    assert {name: target.compute_capability for name, target in TARGETS.items()} == CAPABILITIES


@pytest.mark.parametrize("name", [name for name in CAPABILITIES if name != "cpu"])
def test_fp8_begins_with_ada_and_rtx_is_for_its_gpus(name):
    target = TARGETS[name]
    assert ("fp8" in target.precisions) == (target.compute_capability >= 89)
    assert ("tensorrt_rtx" in target.builders) == (target.compute_capability not in (90, 100))
    assert ("tensorrt" in target.builders) == (target.compute_capability >= 80)


@pytest.mark.parametrize("device", DEVICES)
def test_devices(device):
    assert [name for name, target in TARGETS.items() if target.is_device(device)] == DEVICES[device]
    assert target_of_device(device) == next(map(find_target, DEVICES[device]), None)


def test_an_unknown_target_names_the_table():
    with pytest.raises(ConfigError, match=r"no target 'v100': choose from cpu, t4.*--list"):
        find_target("v100")


def test_list(capsys):
    assert command_line(["engines", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "rtxpro6000  RTX PRO 6000  12.0" in printed
    assert command_line(["engines", "--list", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == set(TARGETS)


@pytest.mark.parametrize(("capability", "text"), [(75, "7.5"), (90, "9.0"), (120, "12.0"), (0, "-")])
def test_capability_text(capability, text):
    assert capability_text(capability) == text
