"""The engines in Triton's own TensorRT backend: the deployment of flavour ``tensorrt``."""

import numpy as np
import pytest
from engine_runs import rows_with

from hstu_trt.bench.chain import NORM, Chain, norm_tensor, open_runner
from hstu_trt.bench.workloads.requests_source import Requests
from hstu_trt.contract.errors import ArtefactError, InputError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, STAGES
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.requests import one_user
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch, tensorrt_flags
from hstu_trt.serving.starting import start

pytestmark = [pytest.mark.tensorrt, pytest.mark.gpu, pytest.mark.triton]
N = 128.0


@pytest.fixture(scope="module")
def served(built, model: ModelFolder, tmp_path_factory: pytest.TempPathFactory):
    """A running server, by its URL."""
    triton = find_tritonserver()
    try:
        flags = tensorrt_flags(triton)
    except ArtefactError as error:
        if "no TensorRT backend" not in str(error):
            raise
        pytest.skip(str(error))
    options = Options(flavour="tensorrt", engines=built(), attention_norm=f"fixed:{N:g}")
    deployment = assemble(model, tmp_path_factory.mktemp("deployment") / "tensorrt", options)
    plan = plan_launch(triton, deployment, Listen(grpc_port=0), flags)
    process, _ = start(deployment, plan)
    yield plan.url
    assert process.drain() == 0


@pytest.mark.parametrize("name", [ENSEMBLE, FUSED])
@pytest.mark.parametrize("histories", ["some events", "no event"])
def test_served_scores_are_those_of_onnx_runtime(
    served, model: ModelFolder, requests: Requests, name: str, histories: str
) -> None:
    """Users without a history apart: their tensors are empty, which Triton's backend may treat in a way of its own."""
    chain = Chain(model, [open_runner("onnxruntime", model, stage) for stage in STAGES])
    with chain, RankingClient(served, name) as client:
        for row in rows_with(requests, histories):
            packed = requests.pack([row])
            feed = {**packed, NORM: norm_tensor(N, model.ranking_config, packed)}
            answer = client.infer(packed) if name == ENSEMBLE else client.infer(one_user(packed))[0]
            report = compare(f"request {row}", answer, chain.infer(feed)["preds"])
            assert report.passes(TOLERANCES[name, "fp16"]), report.text()


def test_a_bad_request_is_refused_before_the_plans(served, requests: Requests) -> None:
    packed = requests.pack(rows_with(requests, "some events")[:1])
    with RankingClient(served, ENSEMBLE) as client:
        with pytest.raises(InputError, match="candidate_offsets"):
            client.infer(packed | {"candidate_offsets": np.array([0, 9999], dtype=np.int32)})
        assert np.isfinite(client.infer(packed)).all()
