"""The layer kernels without a GPU: the mirrors of their parameters, what they refuse, and the plain versions."""

from __future__ import annotations

import ctypes
import dataclasses
import re

import pytest
import torch
from layer_cases import Draw, tokens, vector_weights
from torch import Tensor

from hstu_trt.plugins import layer
from hstu_trt.plugins import layer_reference as reference
from hstu_trt.plugins.layer_library import (
    LAYER_KERNELS,
    MAX_ACTIONS,
    MAX_PROJECT_INPUTS,
    MAX_PROJECTIONS,
    PROJECT_INPUT_STEP,
    PROJECT_WIDTH_STEP,
    EncodeTokensParams,
    GateParams,
    LayerParams,
    NormRowsParams,
    ProjectParams,
    QuantiseRowsParams,
    RowsOut,
    ScoresParams,
    UserVectorsParams,
    load_layer_library,
)
from hstu_trt.plugins.library import ROOT, KernelLibrary, UnsupportedError

HALF, E4M3 = 1, 3
OUT = RowsOut(256, 512, 0.0, HALF)


def test_limits_are_those_of_the_headers() -> None:
    headers = "".join((ROOT / f"plugins/csrc/kernels/layer/{name}.h").read_text() for name in ("params", "project"))
    limits = {name: int(value) for name, value in re.findall(r"constexpr int (k\w+) = (\d+);", headers)}
    assert limits["kMaxActions"] == MAX_ACTIONS
    assert limits["kMaxProjections"] == MAX_PROJECTIONS
    assert limits["kMaxProjectInputs"] == MAX_PROJECT_INPUTS
    assert (limits["kColumns"], limits["kPanelBytes"]) == (PROJECT_WIDTH_STEP, PROJECT_INPUT_STEP)


@pytest.mark.parametrize("mirror", LAYER_KERNELS, ids=lambda mirror: mirror.__name__)
def test_mirrors(library: KernelLibrary, mirror: type[LayerParams]) -> None:
    assert load_layer_library().differences(mirror) == []


def test_a_wrong_mirror_is_noticed(library: KernelLibrary) -> None:
    class Wrong(LayerParams):
        kernel = GateParams.kernel
        _fields_ = tuple(("heads" if n == "width" else n, t) for n, t in GateParams._fields_ if n != "heads")

    assert load_layer_library().differences(Wrong)


def norm(**changes: object) -> NormRowsParams:
    known = {"x": 256, "x_stride": 512, "gain": 256, "bias": 256, "out": OUT, "rows": 5, "width": 512}
    return NormRowsParams(**{**known, **changes})


def project(width: int = 256, **changes: object) -> ProjectParams:
    known = {"x": 256, "weight": 256, "column_scale": 256, "bias": 256, "x_stride": 512, "rows": 5, "inputs": 512,
             "count": 1, "outs": (RowsOut * 4)(OUT)}  # fmt: skip
    return ProjectParams(**{**known, **changes}, widths=(ctypes.c_int32 * 4)(width))


REFUSED = [
    (norm(), None),
    (norm(width=12), "multiple of 8"),
    (norm(width=4096), "up to 2048"),
    (norm(x=264), "16-byte aligned"),
    (norm(x_stride=508), "16-byte aligned"),
    (norm(gain=None), "missing"),
    (norm(delta=256), "a sum needs a place"),
    (norm(swish=1, factor=256), "exclude each other"),
    (norm(out=RowsOut(256, 512, 0.0, E4M3)), "scale above 0"),
    (norm(out=RowsOut(256, 512, 1.0, 0)), "fp16 or e4m3"),
    (norm(rows=-1), "must not be negative"),
    (GateParams(u=256, attention=256, gain=256, bias=256, joined=OUT, rows=5, width=512, heads=5), "head's width"),
    (GateParams(joined=OUT, rows=5, width=512, heads=4), "missing"),
    (QuantiseRowsParams(count=4), "1 to 3 segments"),
    (EncodeTokensParams(normed=OUT, tokens=5, width=512, users=0), "users"),
    (EncodeTokensParams(normed=OUT, tokens=5, width=512, users=1, action_count=13), "at most 12"),
    (EncodeTokensParams(normed=OUT, tokens=5, width=512, users=1), "missing"),
    (UserVectorsParams(x=256, rows=5, width=512, kind=2, gain=256, bias=256), "timestamps"),
    (ScoresParams(rows=5, width=512, tasks=1, binary=2), "binary tasks"),
    (project(), None),
    (project(inputs=640), "up to 512"),
    (project(width=128), "multiple of 256"),
    (project(x_stride=520), "16-byte aligned"),
]


@pytest.mark.parametrize(("params", "said"), REFUSED)
def test_what_the_kernels_refuse(library: KernelLibrary, params: LayerParams, said: str | None) -> None:
    sentence = load_layer_library().unsupported(params)
    assert sentence is None if said is None else sentence is not None and said in sentence


def test_delta_is_added_in_place() -> None:
    draw = Draw(1)
    x, delta, weights = draw.rows(5, 16), draw.rows(5, 16), draw.norm(16)
    total = (x.float() + delta.float()).half()
    out = layer.norm_rows(x, weights, delta=delta)
    assert torch.equal(x, total) and torch.equal(out, layer.norm_rows(total, weights))


def test_e4m3_saturates() -> None:
    stored = reference.stored(torch.tensor([1e9, -1e9, 0.5]), torch.float16, 0.5)
    assert stored.dtype == torch.float8_e4m3fn and stored.float().tolist() == [448.0, -448.0, 1.0]


def test_unknown_ids_take_the_last_row() -> None:
    draw = Draw(2, dtype=torch.float32)
    weights, inputs = tokens(draw, 16)
    x, _ = layer.encode_tokens(weights, inputs, draw.norm(16))
    assert inputs.extra is not None and inputs.extra.index is not None
    index = inputs.extra.index
    outside = (index < 0) | (index > 16)
    assert outside.any()
    inputs.extra.index[outside] = 16
    again, _ = layer.encode_tokens(weights, inputs, Draw(2).norm(16))
    assert torch.equal(x, again)


@pytest.mark.parametrize("kind", ["l2_norm", "layer_norm", "timestamp"])
def test_items_multiply_the_vectors(kind: str) -> None:
    draw = Draw(3, dtype=torch.float32)
    weights, items = vector_weights(draw, kind, 16), (draw.rows(4, 16), draw.norm(16))
    x, times = draw.rows(4, 16), draw.integers(0, 10**9, 4)
    vectors, product = layer.user_vectors(weights, x, times, items=items)
    assert product is not None
    assert torch.allclose(product, vectors * reference.layer_norm(*items), atol=1e-6)


@pytest.fixture
def launched(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> list[LayerParams]:
    """The calls that would go to a GPU: rows count as being on one, and nothing is launched that can be done."""

    def launch(params: LayerParams, on: Tensor) -> None:
        if sentence := load_layer_library().unsupported(params):
            raise UnsupportedError(sentence)
        calls.append(params)

    calls: list[LayerParams] = []
    monkeypatch.setattr(layer, "on_kernels", lambda rows: True)
    monkeypatch.setattr(layer, "_launch", launch)
    return calls


def test_one_eps_for_the_vectors_and_the_items(launched: list[LayerParams]) -> None:
    draw = Draw(4)
    weights, x, items = vector_weights(draw, "layer_norm", 16), draw.rows(4, 16), draw.rows(4, 16)
    layer.user_vectors(weights, x, None, items=(items, draw.norm(16)))
    assert [params.eps for params in launched] == [pytest.approx(1e-5)]
    with pytest.raises(UnsupportedError, match=r"items' norm has 0\.01, the vectors' 1e-05"):
        layer.user_vectors(weights, x, None, items=(items, draw.norm(16, eps=1e-2)))


def test_too_many_kinds_of_actions_are_said(launched: list[LayerParams]) -> None:
    draw = Draw(5)
    weights, inputs = tokens(draw, 16)
    layer.encode_tokens(weights, inputs, draw.norm(16))
    (params,) = launched
    assert isinstance(params, EncodeTokensParams)
    assert list(params.action_masks) == [*weights.action_masks, *[0] * (MAX_ACTIONS - len(weights.action_masks))]
    many = dataclasses.replace(weights, action_masks=tuple(range(MAX_ACTIONS + 1)))
    with pytest.raises(UnsupportedError, match="at most 12 kinds of actions"):
        layer.encode_tokens(many, inputs, draw.norm(16))
