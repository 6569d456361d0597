"""The golden checkpoint as a deployment, for tests that break what serves it."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from fleets import running_fleet
from safetensors.numpy import load_file, save_file

from hstu_trt.bench.fuzz.oracle import Oracle
from hstu_trt.bench.fuzz.requests import make_bases
from hstu_trt.contract.cli import main
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.deployment import Deployment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def deployment(exported, tmp_path_factory) -> Deployment:
    return assemble(read_model_folder(exported("fp32")), tmp_path_factory.mktemp("faults") / "ckptA", Options())


@pytest.fixture(scope="session")
def other_deployment(golden, tmp_path_factory) -> Deployment:
    """The same config with other dense weights: every score differs from that of ``deployment``."""
    folder = tmp_path_factory.mktemp("other")
    tensors = load_file(golden / "caseA/state_dict.safetensors")
    dense = [name for name in tensors if name.endswith("weight") and "embedding" not in name]
    save_file(tensors | {name: tensors[name] * np.float32(1.2) for name in dense}, folder / "weights.safetensors")
    arguments = ["--config", golden / "caseA/config.json", "--weights", folder / "weights.safetensors"]
    assert main(["export", *map(str, arguments), "--precision", "fp32", "--out", str(folder / "model")]) == 0
    return assemble(read_model_folder(folder / "model"), folder / "deployment", Options())


@pytest.fixture(scope="session")
def patient(deployment, tmp_path_factory):
    """The deployment, guarded, with room for all that the fuzzer has in flight: no answer is spared by shedding."""
    subprocess.run(["make", "-s", "-C", str(ROOT), "guard-lib"], check=True, capture_output=True)
    return assemble(deployment.model, tmp_path_factory.mktemp("patient") / "ckptA", Options(queue=1000))


@pytest.fixture(scope="session")
def oracle(deployment):
    """What right answers are."""
    return Oracle(deployment)


@pytest.fixture(scope="session")
def bases(oracle):
    """Model -> good requests, which tests spoil."""
    return make_bases(oracle, oracle.signatures, seed=7)


@pytest.fixture(scope="session")
def fleet(deployment, tmp_path_factory):
    """A fleet of two replicas for all tests of this folder; each leaves two that are well.

    Its folder has a blank in its name, as folders have.
    """
    with running_fleet(deployment, tmp_path_factory.mktemp("fleet") / "a run", 2) as running:
        yield running
