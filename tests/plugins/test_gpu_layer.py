"""The layer kernels against plain PyTorch in fp32, on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from layer_cases import ROWS, SCALES, WIDTHS, Draw, tokens, vector_weights
from torch import Tensor

from hstu_trt.plugins import layer
from hstu_trt.plugins import layer_reference as reference
from hstu_trt.plugins.layer_library import LayerLibrary
from hstu_trt.plugins.library import KernelLibrary, UnsupportedError

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("library")]


def draw(seed: int) -> Draw:
    return Draw(seed, "cuda")


def assert_rows(actual: Tensor, expected: Tensor, scale: float | None) -> None:
    """Both round one fp32 value: fp16 outputs differ by one step at most, e4m3 ones by one of theirs, rarely."""
    a, e = actual.float(), expected.float()
    assert a.isfinite().all()
    step = 2.0**-10 if scale is None else 2.0**-3
    worst = ((a - e).abs() / (e.abs() + 2.0**-8)).max().item() if a.numel() else 0.0
    assert worst <= step * 1.01 + 1e-3, worst
    if scale is not None:
        assert (a != e).float().mean() < 0.02
    assert a.shape == e.shape and actual.dtype == expected.dtype


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["plain", "delta", "swish", "swish delta", "factor"])
def test_norm_rows(width: int, rows: int, scale: float | None, kind: str) -> None:
    d = draw(width + rows)
    x = d.strided(rows, width).mul_(3).add_(1)
    norm = d.norm(width)
    options = {
        "delta": d.rows(rows, width) if "delta" in kind else None,
        "swish": "swish" in kind,
        "factor": d.strided(rows, width) if kind == "factor" else None,
    }
    x_expected = x.clone()
    expected = reference.norm_rows(x_expected, norm, scale=scale, **options)
    assert_rows(layer.norm_rows(x, norm, scale=scale, **options), expected, scale)
    assert torch.equal(x, x_expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("heads", "v_dim"), [(1, 8), (4, 128), (3, 40), (8, 64), (8, 256)])
@pytest.mark.parametrize("group_norm", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_gate(heads: int, v_dim: int, group_norm: bool, scale: float | None, in_place: bool) -> None:
    d, width, rows = draw(heads * v_dim), heads * v_dim, 77
    u, attention = d.strided(rows, width), d.rows(rows, width, scale=1e-3)
    norm = d.norm(heads if group_norm else width, eps=1e-6)
    if in_place and scale is not None:
        pytest.skip("e4m3 has no room for the attention")
    dtype = torch.float16 if scale is None else torch.float8_e4m3fn
    joined, expected = (torch.full((rows, 3 * width), 7.0, device="cuda").to(dtype) for _ in range(2))
    reference.gate(u, attention, norm, expected, heads=heads, group_norm=group_norm, scale=scale)
    source = attention
    if in_place:
        source = joined[:, width : 2 * width].copy_(attention)
    layer.gate(u, source, norm, joined, heads=heads, group_norm=group_norm, scale=scale)
    assert_rows(joined, expected, scale)


def test_quantise_rows() -> None:
    d = draw(3)
    segments = [(d.strided(65, 512), 0.01), (d.strided(65, 520), 0.1), (d.strided(9, 2048), 0.5)]
    for out, (x, scale) in zip(layer.quantise_rows(segments), segments, strict=True):
        assert_rows(out, reference.stored(x.float(), x.dtype, scale), scale)
    saturated = layer.quantise_rows([(d.rows(4, 8, scale=1e4), 0.01)])[0].float()
    assert saturated.abs().max() == 448


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("width", [40, 512, 1024])
@pytest.mark.parametrize(("slots", "table"), [(0, True), (1, True), (3, False)])
def test_encode_tokens(width: int, slots: int, table: bool, scale: float | None) -> None:
    d = draw(width + slots)
    weights, inputs = tokens(d, width, slots=slots, table=table)
    norm = d.norm(width, eps=1e-6)
    expected = reference.encode_tokens(weights, inputs, norm, scale)
    x, normed = layer.encode_tokens(weights, inputs, norm, scale=scale)
    assert_rows(x, expected[0], None)
    # The norm is of the fp16 tokens, which may differ by a step.
    again = reference.stored(reference.layer_norm(x, norm), x.dtype, scale)
    assert_rows(normed, again, scale)
    bare = dataclasses.replace(inputs, extra=None, actions=None)
    bare_weights = dataclasses.replace(weights, actions_table=None)
    expected = reference.encode_tokens(bare_weights, bare, norm, scale)
    assert_rows(layer.encode_tokens(bare_weights, bare, norm, scale=scale)[0], expected[0], None)


@pytest.mark.parametrize("kind", ["l2_norm", "layer_norm", "timestamp"])
@pytest.mark.parametrize("scale", SCALES)
def test_user_vectors(kind: str, scale: float | None) -> None:
    d, rows, width = draw(5), 61, 512
    weights = vector_weights(d, kind, width)
    x, items, times = d.rows(rows, width), d.rows(rows, width), d.integers(-1_000_000, 2_000_000_000, rows)
    vectors, product = layer.user_vectors(weights, x, times, items=(items, d.norm(width)), scale=scale)
    assert_rows(vectors, reference.user_vectors(weights, x, times), None)
    alone, none = layer.user_vectors(weights, x, times)
    assert torch.equal(alone, vectors) and none is None
    d = draw(5)
    vector_weights(d, kind, width)
    d.rows(rows, width), d.rows(rows, width), d.integers(-1_000_000, 2_000_000_000, rows)
    expected = reference.norm_rows(items, d.norm(width), delta=None, swish=False, factor=vectors, scale=scale)
    assert product is not None
    assert_rows(product, expected, scale)


@pytest.mark.parametrize("tasks", [1, 3])
def test_scores(tasks: int) -> None:
    d = draw(9)
    hidden, norm = d.rows(50, 512), d.norm(512)
    weight, bias = d.fp32(tasks, 512) / 22, d.fp32(tasks)
    for binary in range(tasks + 1):
        expected = reference.scores(hidden, norm, weight, bias, binary=binary)
        actual = layer.scores(hidden, norm, weight, bias, binary=binary)
        assert torch.allclose(actual, expected, atol=2e-5)


def test_what_the_kernels_refuse(library: KernelLibrary) -> None:
    d = draw(1)
    with pytest.raises(UnsupportedError, match="multiple of 8"):
        layer.norm_rows(d.rows(3, 12), d.norm(12))
    with pytest.raises(UnsupportedError, match="16-byte aligned"):
        layer.norm_rows(d.rows(3, 32)[:, 4:12], d.norm(8))
    assert LayerLibrary().differences is not None


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200, 9000])
@pytest.mark.parametrize("inputs", [128, 384, 512])
@pytest.mark.parametrize(
    "outputs", [((256, None),), ((512, None), (512, 0.05), (256, 0.1), (768, 0.02)), ((512, 0.03),) * 2]
)
def test_project(rows: int, inputs: int, outputs: tuple[tuple[int, float | None], ...]) -> None:
    d = draw(rows + inputs)
    columns = sum(width for width, _ in outputs)
    x, weight = (d.rows(n, inputs).to(torch.float8_e4m3fn) for n in (rows, columns))
    scale, bias = d.fp32(columns).abs() * inputs**-0.5, d.fp32(columns)
    if not layer.can_project(x, outputs):
        pytest.skip("no kernel for this GPU")
    expected = reference.project(x, weight, scale, bias, outputs)
    for actual, wanted, (_, out_scale) in zip(
        layer.project(x, weight, scale, bias, outputs), expected, outputs, strict=True
    ):
        # The sums are added in another order, and by tensor cores in less than fp32.
        difference = (actual.float() - wanted.float()).norm() / wanted.float().norm()
        assert difference < (2e-3 if out_scale is None else 2e-2), difference
        assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
