"""The reference's golden cases through the kernels: bare attention, the cache, and whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from golden_attention import DELTA_SETTINGS, SETTINGS, GoldenCall, delta_call, full_call
from golden_cases import GoldenCase, assert_close, embed, load_case, offsets, to_split
from stack_cases import STACK_CASES, stack_case
from torch import Tensor
from torch.nn.functional import pad

from hstu_trt.export.build import build_ranking_model
from hstu_trt.export.kv_cache import forward_cached, prefill
from hstu_trt.export.layers import StuStack, TokenLayout
from hstu_trt.export.model import cast_to
from hstu_trt.plugins import attention as kernels
from hstu_trt.plugins.attention import attention
from hstu_trt.plugins.library import KernelLibrary
from hstu_trt.plugins.parameters import AttentionCall, AttentionOptions, Offsets

if TYPE_CHECKING:
    from attention_cases import GpuBackend

pytestmark = pytest.mark.gpu
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CALLS = {**{name: (full_call, SETTINGS[name]) for name in SETTINGS},
         **{name: (delta_call, DELTA_SETTINGS[name]) for name in DELTA_SETTINGS}}  # fmt: skip


def kernel_call(golden: GoldenCall, dtype: torch.dtype, dim: int) -> AttentionCall:
    """A golden call on the GPU. Head dims below ``dim`` are filled with zeros, which changes no sum."""

    def filled(x: Tensor) -> Tensor:
        return pad(x.to("cuda", dtype), (0, max(0, dim - x.shape[2])))

    tensors = golden.tensors
    options = {**golden.attributes, "causal": bool(golden.attributes["causal"])}
    bounds = (tensors[f"{name}_offsets"].cuda() for name in Offsets._fields)
    scale = tensors.get("attn_scale")
    return AttentionCall(
        q=filled(tensors["q"]),
        k=filled(tensors["k"]),
        v=filled(tensors["v"]),
        offsets=Offsets(*bounds),
        norm=tensors["norm"].cuda(),
        options=AttentionOptions(**options),
        attn_scale=None if scale is None else scale.cuda(),
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("kernel", "precision", "dim"),
    [("fp32", "fp32", 0), ("smxx", "fp16", 0), ("smxx", "bf16", 0), ("sm90", "fp16", 64), ("sm90", "bf16", 128)],
)
def test_golden_settings(gpu: GpuBackend, name: str, kernel: str, precision: str, dim: int) -> None:
    make, case = CALLS[name]
    golden = make(case)
    call = kernel_call(golden, DTYPES[precision], dim)
    reason = gpu.unsupported(call, kernel, DTYPES[precision])
    if reason and (not call.options.causal or "9.0" in reason):
        pytest.skip(reason)
    out = attention(call, kernel=kernel)[..., : golden.expected.shape[2]]
    assert_close(name, out.float().cpu().contiguous(), golden.expected, "attention", precision)


@pytest.fixture
def kernel_ops(library: KernelLibrary) -> None:
    """The torch ops run the kernels on CUDA tensors from here on."""
    import hstu_trt.plugins.torch_ops  # noqa: F401


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["caseA", "caseB", "caseB2", "caseB3"])
@torch.inference_mode()
def test_models_run_on_the_kernels(
    kernel_ops: None, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    calls: list[torch.dtype] = []

    def spy(call: AttentionCall, **options: Any) -> Tensor:
        calls.append(call.q.dtype)
        return attention(call, **options)

    monkeypatch.setattr(kernels, "attention", spy)
    case = load_case(name)
    model = build_ranking_model(case.config, case.checkpoint.dense, "golden", precision).cuda()
    rows = embed(case, {"fp32": "float32", "fp16": "float16"}[precision])
    inputs = {key: tensor.cuda() for key, tensor in rows.items()}
    taps: list[Tensor] = []
    vectors = model.hstu_stage(inputs, taps)
    assert calls == [DTYPES[precision]] * case.config.layers
    scores = model.head_stage({**inputs, "user_embeddings": model.hstu_stage(inputs)})
    check_outputs(case, taps, vectors, scores, precision)


def check_outputs(case: GoldenCase, taps: list[Tensor], vectors: Tensor, scores: Tensor, precision: str) -> None:
    outputs = case.outputs
    for layer, tap in enumerate(taps):
        expected = case.split(outputs[f"tc.stu.{layer}.out"])
        assert_close(f"stu.{layer}", tap.float().cpu(), expected, "stu", precision)
    assert_close("user embeddings", vectors.float().cpu(), outputs["tc.out.user_embeddings"], "hstu", precision)
    assert_close("preds", scores.T.cpu().contiguous(), outputs["tc.out.preds"], "ranking", precision)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", STACK_CASES)
@torch.inference_mode()
def test_golden_cache(kernel_ops: None, name: str, precision: str) -> None:
    """CaseD: all but the last candidates with a cache, then those candidates over it, by both of the ops."""
    stack, tensors, facts = stack_case(name)
    cast_to(stack, DTYPES[precision])
    stack = stack.cuda()
    lengths, candidates, delta = tensors["x_lengths"], tensors["num_targets"], facts["delta"]
    early, norm = candidates - delta, torch.tensor([float(facts["N"])], device="cuda")
    users = tensors["x"].split(lengths.tolist())
    rows = torch.cat([user[: n - delta] for user, n in zip(users, lengths, strict=True)])
    rows = to_split(rows, lengths - delta, early).to("cuda", DTYPES[precision])
    prefix = int((lengths - candidates).sum())
    layout = TokenLayout(offsets(lengths - candidates).cuda(), offsets(early).cuda())
    out, cache = prefill(stack, rows[:prefix], rows[prefix:], layout, norm)
    expected = to_split(tensors["prefill_out"], lengths - delta, early)
    assert_close("prefill", out.float().cpu(), expected, "cached_stu", precision)

    none = torch.zeros_like(layout.prefix_offsets)
    new = offsets(torch.full_like(lengths, delta)).cuda()
    x = tensors["delta_x"].to("cuda", DTYPES[precision])
    joined = forward_cached(stack, x, none, new, cache, norm)
    assert_close("cache and rows joined", joined.float().cpu(), tensors["delta_out"], "cached_stu", precision)
    for layer, k, v in zip(stack.layers, cache.keys, cache.values, strict=True):
        u, new_v, q, new_k = layer.project(x)
        attended = torch.ops.hstu_trt.cached_attention(
            q, new_k, new_v, k, v, cache.offsets, None, none, none, new, norm, None, None, None, None,
            stack.alpha, True, *options(stack), 1, torch.float32,
        )  # fmt: skip
        x = layer.output(x, u, attended)
    assert_close("cached attention", x.float().cpu(), tensors["mfalcon_delta_out"], "cached_stu", precision)


def options(stack: StuStack) -> tuple[int, int, int]:
    chosen = stack.options
    return chosen.max_attn_len, chosen.contextual_seq_len, chosen.min_full_attn_seq_len
