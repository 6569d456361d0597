"""Few queries over a cache: clusters share items, and no list is made. Any lengths within the bounds."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING

import pytest
import torch
from attention_calls import assemble
from attention_inputs import CANDIDATES, TILE_EDGES, Case, User, make_tokens, random_case

from hstu_trt.plugins.attention import AttentionPlan, attention, pack_values
from hstu_trt.plugins.parameters import AttentionCall, AttentionOptions

if TYPE_CHECKING:
    from attention_cases import GpuBackend

pytestmark = pytest.mark.gpu

CLUSTERS = {(16, 4): 2, (13, 4): 2, (33, 2): 2, (66, 1): 2, (8, 4): 4, (28, 1): 4, (4, 4): 8, (5, 3): 8}
"""(users, heads) -> CTAs per cluster on 132 multiprocessors, with up to 128 query rows per user on average."""


def few_queries_case(seed: int) -> Case:
    """A random case with as many users and heads as clusters are chosen for, of about as many rows as items have."""
    rng = random.Random(seed)
    count, heads = rng.choice(list(CLUSTERS))
    most = rng.choice([0, 300, 1500, 4000])

    def user() -> User:
        rows = rng.choice(TILE_EDGES[:12]) if rng.random() < 0.3 else 0
        cached = rng.randrange(most) if most and rng.random() < 0.7 else rng.choice(TILE_EDGES)
        return User(cached, rows, rng.choice([0, rows, rows // 2]), rng.choice(CANDIDATES))

    case = random_case(seed)
    dtype = rng.choice(["fp16", "bf16", "fp8"])
    return dataclasses.replace(
        case, users=tuple(user() for _ in range(count)), heads=heads, qk_dim=128, v_dim=128, dtype=dtype, bias=False,
        cache=rng.choice(["contiguous", "paged"]), page_size=128 if dtype == "fp8" else rng.choice([64, 128, 256]),
        packed_values=dtype == "fp8" and rng.random() < 0.5, output=rng.choice(["fp32", "bf16", "fp16"]),
        layout=rng.choice(["packed", "padded", "uvqk"]), outliers=1.0,
        norm=rng.choice(["one", "users"]),
        options=dataclasses.replace(
            case.options, causal=True, alpha=128**-0.5, candidate_group_size=rng.choice([1, 1, 2, 8, 64])
        ),
    )  # fmt: skip


def test_random_calls(gpu: GpuBackend) -> None:
    from attention_cases import check_cases

    # Alone, a user's items may be cut into more parts.
    summary = check_cases(map(few_queries_case, range(120)), gpu, ["sm90"], exact_each=40, alone=False)
    print(f"\n{summary.text()}")
    assert not summary.failures
    if torch.cuda.get_device_capability() == (9, 0):
        assert summary.runs("sm90") == 120


def make_call(case: Case) -> AttentionCall:
    return assemble(case, make_tokens(case, "cuda"), range(len(case.users)), pack_values)


def skip_unless_hopper(gpu: GpuBackend, call: AttentionCall) -> None:
    if reason := gpu.unsupported(call, "sm90", torch.float16):
        pytest.skip(reason)
    if (count := torch.cuda.get_device_properties(gpu.device).multi_processor_count) != 132:
        pytest.skip(f"clusters are chosen by the number of multiprocessors: {count} here, not 132")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8"])
@pytest.mark.parametrize("shape", CLUSTERS)
def test_clusters_are_chosen_and_repeat_bitwise(gpu: GpuBackend, shape: tuple[int, int], dtype: str) -> None:
    count, heads = shape
    users = tuple(User(700 + 331 * n % 2500, 0, 0, 128) for n in range(count))
    case = Case(3, users, heads, 128, 128, dtype, options=AttentionOptions(128**-0.5), cache="contiguous")
    call = make_call(case)
    skip_unless_hopper(gpu, call)
    attention(call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        first = attention(call)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "hstu_trt" in event.name]
    assert any("cluster_kernel" in name for name in names), names
    assert not any("plan_kernel" in name for name in names), names
    oracle = attention(call, kernel="fp32", output_dtype=torch.float32)
    assert (first.float() - oracle).norm() <= {"fp16": 3.2e-4, "bf16": 2.6e-3, "fp8": 0.1}[dtype] * oracle.norm()
    plan = AttentionPlan()
    assert all(attention(call, plan=plan).equal(first) for _ in range(30))
    whole = dataclasses.replace(call, whole_items=True)
    assert (attention(whole).float() - oracle).norm() <= {"fp16": 1e-3, "bf16": 4e-3, "fp8": 0.1}[dtype] * oracle.norm()


SPREADS = [
    [128] * 16,
    [2048, *[0] * 15],
    [0] * 16,
    [1, 2, 3, 300, 0, 64, 65, 127, 129, 128, 500, 400, 0, 0, 0, 200],
    [0] * 15 + [2048],
    [1] * 16,
]
"""Candidates of 16 users: as alike as the bounds promise, all with one, none at all, any."""


@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_a_graph_replays_with_other_lengths(gpu: GpuBackend, dtype: str) -> None:
    """The bounds choose the kernel when the graph is captured; then one user may have all candidates or all keys."""

    def case_of(candidates: list[int], cached: list[int]) -> Case:
        users = tuple(User(keys, 0, 0, rows) for keys, rows in zip(cached, candidates, strict=True))
        return Case(
            len(users), users, 4, 128, 128, dtype, options=AttentionOptions(128**-0.5), cache="contiguous",
            slack=2048 - sum(candidates), packed_values=False,
        )  # fmt: skip

    captured = make_call(case_of([128] * 16, [600] * 16))
    skip_unless_hopper(gpu, captured)
    out = captured.empty_output(torch.float16)
    attention(captured, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(captured, out=out)
    for number, candidates in enumerate(SPREADS):
        cached = [600] * 16 if number == 0 else [9600, *[0] * 15] if number % 2 else [7 * n * n for n in range(16)]
        other = make_call(case_of(candidates, cached))
        copy_cached_call(captured, other)
        out.fill_(float("nan"))
        graph.replay()
        used = sum(candidates)
        assert out[:used].isfinite().all()
        assert out[used:].isnan().all()
        assert out[:used].equal(attention(other)[:used])
        oracle = attention(other, kernel="fp32", output_dtype=torch.float32)[:used]
        assert (out[:used].float() - oracle).norm() <= (1e-3 if dtype == "fp16" else 0.1) * oracle.norm() + 1e-6


def copy_cached_call(call: AttentionCall, other: AttentionCall) -> None:
    """Puts another call's inputs where a captured one reads; its cache may have fewer rows."""
    assert call.cache and other.cache
    pairs = [(call.q, other.q), (call.k, other.k), (call.v, other.v), (call.norm, other.norm)]
    pairs += [*zip(call.offsets, other.offsets, strict=True), (call.cache.offsets, other.cache.offsets)]
    if call.scales and other.scales:
        pairs += list(zip(call.scales, other.scales, strict=True))
    for mine, theirs in pairs:
        mine.copy_(theirs)
    for mine, theirs in ((call.cache.k, other.cache.k), (call.cache.v, other.cache.v)):
        mine[: len(theirs)].copy_(theirs)
