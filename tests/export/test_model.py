"""The PyTorch model against the reference's goldens: hidden states, user vectors, scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from golden_cases import GoldenCase, assert_close, embed, load_case, offsets, to_split
from stack_cases import STACK_CASES, stack_case
from torch import Tensor

from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.export.build import build_ranking_model
from hstu_trt.export.kv_cache import forward_cached, prefill
from hstu_trt.export.layers import TokenLayout
from hstu_trt.export.model import DlrmHstu, TimestampPostprocessor


@torch.inference_mode()
def score(case: GoldenCase, precision: str = "fp32", taps: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """(user vectors, scores [candidates, tasks]) of a case."""
    model = build_ranking_model(case.config, case.checkpoint.dense, "golden", precision)
    inputs = embed(case, {"fp32": "float32", "fp16": "float16"}[precision])
    vectors = model.hstu_stage(inputs, taps)
    return vectors, model.head_stage({**inputs, "user_embeddings": vectors})


def test_scores_and_user_vectors(golden_case: GoldenCase) -> None:
    vectors, scores = score(golden_case)
    assert_close("user embeddings", vectors, golden_case.outputs["tc.out.user_embeddings"], "hstu")
    assert_close("preds", scores.T.contiguous(), golden_case.outputs["tc.out.preds"], "ranking")


def test_every_layers_output(golden_case: GoldenCase) -> None:
    taps: list[Tensor] = []
    vectors, _ = score(golden_case, taps=taps)
    assert len(taps) == golden_case.config.layers
    for layer, rows in enumerate(taps):
        assert_close(f"stu.{layer}", rows, golden_case.split(golden_case.outputs[f"tc.stu.{layer}.out"]), "stu")
    # The full last layer and the candidates-only one give the same vectors.
    assert_close("user embeddings", vectors, score(golden_case)[0], "hstu")


def test_the_references_cpu_clamp(golden_case: GoldenCase) -> None:
    """time_bucket_clamp "dim" reproduces the un-prefixed golden_case, which its CPU kernel made."""
    config = dataclasses.replace(golden_case.config, time_bucket_clamp="dim")
    vectors, scores = score(dataclasses.replace(golden_case, config=config))
    assert_close("user embeddings", vectors, golden_case.outputs["out.user_embeddings"], "hstu")
    assert_close("preds", scores.T.contiguous(), golden_case.outputs["out.preds"], "ranking")


def test_fp16_error_is_that_of_the_format(golden_case: GoldenCase) -> None:
    vectors, scores = score(golden_case, "fp16")
    assert_close("user embeddings", vectors.float(), golden_case.outputs["tc.out.user_embeddings"], "hstu", "fp16")
    assert_close("preds", scores.T.contiguous(), golden_case.outputs["tc.out.preds"], "ranking", "fp16")


def one_user(case: GoldenCase, user: int) -> dict[str, Tensor]:
    """The inputs of one user alone, with the batch's N."""
    inputs = embed(case)
    history, items = (inputs[f"{side}_offsets"].tolist() for side in ("uih", "candidate"))
    rows = {"uih": slice(history[user], history[user + 1]), "candidate": slice(items[user], items[user + 1])}
    solo = {}
    for name, value in inputs.items():
        side = name.split("_")[0]
        solo[name] = value[rows[side]] if side in rows else value[user : user + 1]
    return solo | {
        "uih_offsets": torch.tensor([0, history[user + 1] - history[user]], dtype=torch.int32),
        "candidate_offsets": torch.tensor([0, items[user + 1] - items[user]], dtype=torch.int32),
        "attention_norm": inputs["attention_norm"],
    }


@torch.inference_mode()
def test_no_token_sees_a_batch_mate(golden_case: GoldenCase) -> None:
    """To a few roundings, since a GEMM of another size adds in another order; the runners are exact."""
    model = build_ranking_model(golden_case.config, golden_case.checkpoint.dense, "golden", "fp32")
    _, together = score(golden_case)
    bounds = golden_case.request["candidate_offsets"]
    for user in range(len(bounds) - 1):
        inputs = one_user(golden_case, user)
        alone = model.head_stage({**inputs, "user_embeddings": model.hstu_stage(inputs)})
        torch.testing.assert_close(alone, together[bounds[user] : bounds[user + 1]], atol=1e-5, rtol=0)


def test_a_wrong_norm_is_noticed(case_a: GoldenCase) -> None:
    wrong = {**case_a.request, "attention_norm": case_a.request["attention_norm"] * 1.1}
    vectors, _ = score(dataclasses.replace(case_a, request=wrong))
    report = compare("user embeddings", vectors.numpy(), case_a.outputs["tc.out.user_embeddings"].numpy())
    assert not report.passes(TOLERANCES["hstu", "fp32"])


def test_hours_are_counted_exactly() -> None:
    """1753437601 rounds to 1753437568 in fp32, which is in hour 487065; a fp32 quotient says 487066."""
    post = TimestampPostprocessor(load_case("caseA").config)
    features = post._time_features(torch.tensor([1753437601]))
    hour = 487065 % 24
    angle = torch.tensor(hour / 24 * 2 * 3.14)
    torch.testing.assert_close(features[0, :2], torch.stack([angle.cos(), angle.sin()]), atol=1e-6, rtol=0)


def test_milliseconds_are_counted_as_the_reference_counts_them() -> None:
    """1753437601000 ms are 131072 apart in fp32, and 487066000 of the "hours" 32 apart: the count itself is rounded."""
    times = 1_753_437_601_000 + 999_983 * torch.arange(1000)
    count = torch.div(times.float(), 3600.0, rounding_mode="floor")
    angle = count.remainder(24.0) / 24 * 2 * 3.14
    features = TimestampPostprocessor(load_case("caseA").config)._time_features(times)
    torch.testing.assert_close(features[:, :2], torch.stack([angle.cos(), angle.sin()], dim=1), atol=1e-6, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("name", STACK_CASES)
def test_prefill_caches_and_micro_batches(name: str) -> None:
    stack, t, facts = stack_case(name)
    delta, norm = facts["delta"], torch.tensor([float(facts["N"])])
    lengths, candidates = t["x_lengths"], t["num_targets"]
    prefix, early = lengths - candidates, candidates - delta
    early_bounds, prefix_bounds = offsets(early), offsets(prefix)
    prefilled = torch.cat([user[: n - delta] for user, n in zip(t["x"].split(lengths.tolist()), lengths, strict=True)])
    rows = to_split(prefilled, lengths - delta, early)
    split_at = int(prefix.sum())
    layout = TokenLayout(prefix_bounds, early_bounds)
    out, cache = prefill(stack, rows[:split_at], rows[split_at:], layout, norm)

    assert_close("prefill", out, to_split(t["prefill_out"], lengths - delta, early), "cached_stu")
    for layer in range(2):
        stored = to_split(t[f"k_cache.{layer}"], lengths - delta, early)[:split_at]
        assert_close(f"k_cache.{layer}", cache.keys[layer].flatten(1), stored, "cached_stu")
    none = torch.zeros_like(prefix_bounds)
    new = offsets(torch.full_like(lengths, delta))
    cached = forward_cached(stack, t["delta_x"], none, new, cache, norm)
    assert_close("cached", cached, t["delta_out"], "cached_stu")
    assert_close("micro-batch", cached, t["mfalcon_delta_out"], "cached_stu")


@torch.inference_mode()
def test_new_history_behind_a_cache_gives_the_full_pass() -> None:
    stack, _, facts = stack_case("d0")
    generator = torch.Generator().manual_seed(3)
    history, candidates = torch.randn(12, 32, generator=generator), torch.randn(5, 32, generator=generator)
    norm = torch.tensor([float(facts["N"])])
    full_layout = TokenLayout(torch.tensor([0, 5, 12]).int(), torch.tensor([0, 2, 5]).int())
    full, _ = prefill(stack, history, candidates, full_layout, norm)
    old = [0, 1, 2, 5, 6, 7, 8, 9]
    _, cache = prefill(
        stack, history[old], candidates[:0], TokenLayout(torch.tensor([0, 3, 8]).int(), torch.zeros(3).int()), norm
    )
    fresh = torch.cat([history[[3, 4, 10, 11]], candidates])
    out = forward_cached(stack, fresh, torch.tensor([0, 2, 4]).int(), full_layout.candidate_offsets, cache, norm)
    assert_close("appended", out, full[[3, 4, 10, 11, 12, 13, 14, 15, 16]], "cached_stu")


def test_dlrm_v3_has_the_references_parameter_count() -> None:
    from hstu_trt.contract.presets import dlrm_v3

    with torch.device("meta"):
        model = DlrmHstu(dlrm_v3())
    assert sum(p.numel() for p in model.parameters()) == 16_693_585
