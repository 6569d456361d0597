"""What the tests on TensorRT rest on, checked without it."""

import numpy as np
import pytest
from engine_runs import op_nodes, other_lengths

from hstu_trt.bench.polygraphy_feeds import feeds
from hstu_trt.contract.features import check_request
from hstu_trt.contract.tensors import FUSED


def test_op_nodes_are_counted(model) -> None:
    layers, tables = model.ranking_config.layers, len(model.specs["embedding_lookup"].outputs)
    assert op_nodes(model.onnx("hstu")) == layers
    assert op_nodes(model.onnx("embedding_lookup")) >= tables
    assert op_nodes(model.onnx(FUSED)) == layers + op_nodes(model.onnx("embedding_lookup"))
    assert op_nodes(model.onnx("mlp_head")) == 0


@pytest.mark.parametrize("stage", ["hstu", FUSED])
def test_the_other_request_is_one(model, requests, stage) -> None:
    (feed, *_) = feeds(model, stage, requests, 128.0)
    other = other_lengths(feed)
    check_request(other, model.specs[stage], model.limits)
    assert {name: array.shape for name, array in other.items()} == {name: array.shape for name, array in feed.items()}
    assert not np.array_equal(other["uih_offsets"], feed["uih_offsets"])
