"""The golden checkpoint as a deployment, for tests that break what serves it."""

import pytest

from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.deployment import Deployment


@pytest.fixture(scope="session")
def deployment(exported, tmp_path_factory) -> Deployment:
    return assemble(read_model_folder(exported("fp32")), tmp_path_factory.mktemp("faults") / "ckptA", Options())
