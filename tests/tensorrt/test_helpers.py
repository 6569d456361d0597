"""What the tests on TensorRT rest on, checked without it."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from engine_runs import CapturedCall, lean_library, op_nodes, other_lengths, rows_with

from hstu_trt.bench.polygraphy_feeds import feeds
from hstu_trt.contract.features import check_request
from hstu_trt.contract.tensors import FUSED


def test_op_nodes_are_counted(model) -> None:
    layers, tables = model.ranking_config.layers, len(model.specs["embedding_lookup"].outputs)
    assert op_nodes(model.onnx("hstu")) == layers
    assert op_nodes(model.onnx("embedding_lookup")) >= tables
    assert op_nodes(model.onnx(FUSED)) == layers + op_nodes(model.onnx("embedding_lookup"))
    assert op_nodes(model.onnx("mlp_head")) == 0


@pytest.mark.parametrize(("number", "found"), [(110400, "libnvinfer_lean.so.11"), (110300, None), (None, None)])
def test_the_lean_runtime_is_of_that_very_version(number: int | None, found: str | None) -> None:
    def load(path: str) -> SimpleNamespace:
        if number is None or path != "libnvinfer_lean.so.11":
            raise OSError(path)
        return SimpleNamespace(getInferLibVersion=lambda: number)

    assert lean_library("11.4.0.106", load) == found


def test_users_with_and_without_a_history_are_all_there_are(requests) -> None:
    some, none = rows_with(requests, "some events"), rows_with(requests, "no event")
    assert sorted(some + none) == list(range(len(requests)))
    assert not requests.history_lengths[none].any() and requests.history_lengths[some].all()


@pytest.mark.parametrize("stage", ["hstu", FUSED])
def test_the_other_request_is_one(model, requests, stage) -> None:
    (feed, *_) = feeds(model, stage, requests, 128.0)
    other = other_lengths(feed)
    check_request(other, model.specs[stage], model.limits)
    assert {name: array.shape for name, array in other.items()} == {name: array.shape for name, array in feed.items()}
    assert not np.array_equal(other["uih_offsets"], feed["uih_offsets"])


class CopyingContext:
    """Stands for an execution context: copies input ``x`` to output ``y`` on the stream that it is given."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        y, x = (ctypes.c_uint64(self.addresses[name]) for name in "yx")
        size = ctypes.c_size_t(4 * int(np.prod(self.shape)))
        return ctypes.CDLL("libcuda.so.1").cuMemcpyDtoDAsync_v2(y, x, size, ctypes.c_void_p(stream)) == 0


@pytest.mark.gpu
def test_a_replay_sees_the_values_at_hand() -> None:
    a, b = (np.full((3, 2), value, dtype=np.float32) for value in (1, 2))
    call = CapturedCall(CopyingContext(), {"x": a}, {"y": "float32"})
    for feed in (a, b, a, b):
        assert np.array_equal(call.replay({"x": feed})["y"], feed)
