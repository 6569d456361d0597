"""The kernels on a GPU: random calls, accuracy, CUDA graphs, plans, value blocks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from attention_calls import assemble, packed_values
from attention_inputs import DTYPES, Case, User, make_tokens, random_case
from torch import Tensor

from hstu_trt.contract.errors import HstuTrtError, InputError
from hstu_trt.plugins.attention import AttentionPlan, attention, pack_values
from hstu_trt.plugins.library import KernelLibrary
from hstu_trt.plugins.parameters import AttentionCall, AttentionOptions

if TYPE_CHECKING:
    from attention_cases import GpuBackend

pytestmark = pytest.mark.gpu
FAST_KERNELS = ("sm90", "smxx")


def make_call(case: Case) -> AttentionCall:
    return assemble(case, make_tokens(case, "cuda"), range(len(case.users)), pack_values)


def skip_unless_done(gpu: GpuBackend, call: AttentionCall, kernel: str, output: torch.dtype = torch.float16) -> None:
    if reason := gpu.unsupported(call, kernel, output):
        pytest.skip(reason)


def test_a_thousand_random_calls(gpu: GpuBackend) -> None:
    from attention_cases import check_cases

    summary = check_cases(map(random_case, range(1000)), gpu, FAST_KERNELS)
    print(f"\n{summary.text()}")
    assert not summary.failures
    assert summary.runs("smxx") > 500
    if torch.cuda.get_device_capability() == (9, 0):
        assert summary.runs("sm90") > 150


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8"])
def test_errors_at_every_length(gpu: GpuBackend, dtype: str) -> None:
    from attention_accuracy import accuracy_cases, measure, table

    cases = [case for case in accuracy_cases() if case.dtype == dtype]
    results = [one for case in cases for one in measure(case, FAST_KERNELS, gpu)]
    print(f"\n{table(results)}")
    assert results
    assert [fault for one in results for fault in one.faults] == []


def test_value_blocks_are_as_defined(gpu: GpuBackend) -> None:
    for seed in range(20):
        case = dataclasses.replace(random_case(seed), dtype="fp8", cache="none", packed_values=False, bias=False)
        if case.layout == "odd":
            case = dataclasses.replace(case, layout="padded")
        call = make_call(case)
        blocks = pack_values(call.v, call.offsets.prefix, call.offsets.candidate)
        expected = packed_values(call.v, call.offsets.prefix, call.offsets.candidate)
        # Blocks that no user has are anything: compared are those with a value in them.
        used = packed_values(torch.ones_like(call.v.float()).to(call.v.dtype), *call.offsets[1:]).view(torch.uint8)
        chosen = used.flatten(1).ne(0).any(dim=1)
        assert blocks[chosen].view(torch.uint8).equal(expected[chosen].view(torch.uint8)), case


GRAPH_CASE = Case(
    seed=5, users=(User(0, 300, 300, 40), User(0, 5, 5, 200), User(0, 129, 129, 0)),
    options=AttentionOptions(0.125, contextual_seq_len=3),
)  # fmt: skip
GRAPH_LENGTHS = [
    (User(0, 100, 100, 40), User(0, 205, 205, 100), User(0, 129, 129, 100)),
    (User(0, 0, 0, 240), User(0, 434, 434, 0), User(0, 0, 0, 0)),
    (User(0, 1, 1, 1), User(0, 0, 0, 0), User(0, 2, 2, 1)),
]


@pytest.mark.parametrize("kernel", [*FAST_KERNELS, "fp32"])
@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_a_graph_replays_with_other_lengths(gpu: GpuBackend, kernel: str, dtype: str) -> None:
    case = dataclasses.replace(GRAPH_CASE, dtype=dtype)
    call = make_call(case)
    skip_unless_done(gpu, call, kernel)
    out = call.empty_output(torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attention(call, out=out, kernel=kernel)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(call, out=out, kernel=kernel)
    for users in (case.users, *GRAPH_LENGTHS):
        slack = call.q.shape[0] - sum(user.rows + user.candidates for user in users)
        other = make_call(dataclasses.replace(case, users=users, slack=slack))
        copy_into(call, other)
        out.fill_(float("nan"))
        graph.replay()
        used = out.shape[0] - slack
        expected = attention(call, kernel=kernel)
        assert out[:used].isfinite().all()
        assert out[:used].equal(expected[:used])
        oracle = attention(call, kernel="fp32", output_dtype=torch.float32)[:used]
        assert (out[:used].float() - oracle).norm() <= (1e-3 if dtype == "fp16" else 0.1) * oracle.norm() + 1e-6


def copy_into(call: AttentionCall, other: AttentionCall) -> None:
    """Puts another call's inputs where a captured one reads."""
    pairs = [(call.q, other.q), (call.k, other.k), (call.v, other.v), (call.norm, other.norm)]
    pairs += list(zip(call.offsets, other.offsets, strict=True))
    if call.scales and other.scales:
        pairs += list(zip(call.scales, other.scales, strict=True))
    for mine, theirs in pairs:
        mine.copy_(theirs)


@pytest.mark.parametrize("kernel", FAST_KERNELS)
@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_layers_share_a_plan(gpu: GpuBackend, kernel: str, dtype: str) -> None:
    call = make_call(dataclasses.replace(GRAPH_CASE, dtype=dtype))
    skip_unless_done(gpu, call, kernel)
    plan = AttentionPlan()
    for layer in range(4):
        tokens = make_tokens(dataclasses.replace(GRAPH_CASE, dtype=dtype, seed=layer), "cuda")
        other = assemble(dataclasses.replace(GRAPH_CASE, dtype=dtype), tokens, range(3), pack_values)
        this = dataclasses.replace(call, q=other.q, k=other.k, v=other.v)
        assert attention(this, kernel=kernel, plan=plan).equal(attention(this, kernel=kernel))
    with pytest.raises(InputError, match="make another one"):
        attention(dataclasses.replace(call, options=AttentionOptions()), kernel=kernel, plan=plan)


# Few and long: what makes the planner cut items along the keys.
LONG_CASE = Case(
    seed=7, users=(User(3000, 0, 0, 130), User(2000, 200, 200, 5), User(130, 0, 0, 64)), cache="contiguous",
    options=AttentionOptions(0.125),
)  # fmt: skip


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_split_items_add_up(gpu: GpuBackend, dtype: str, dim: int) -> None:
    call = make_call(dataclasses.replace(LONG_CASE, dtype=dtype, qk_dim=dim, v_dim=dim))
    skip_unless_done(gpu, call, "sm90")
    oracle = attention(call, kernel="fp32", output_dtype=torch.float32)
    allowed = (1e-3 if dtype == "fp16" else 0.1) * oracle.norm()
    first = attention(call, kernel="sm90")
    assert (first.float() - oracle).norm() <= allowed
    plan = AttentionPlan()
    assert all(attention(call, kernel="sm90", plan=plan).equal(first) for _ in range(20))
    whole = dataclasses.replace(call, whole_items=True)
    assert (attention(whole, kernel="sm90").float() - oracle).norm() <= allowed


@pytest.mark.parametrize("kernel", FAST_KERNELS)
@pytest.mark.parametrize("dtype", ["fp16", "fp8"])
def test_bits_of_whole_items_do_not_depend_on_company(gpu: GpuBackend, kernel: str, dtype: str) -> None:
    users = (User(0, 2900, 2900, 130), *(User(0, 700 + n, 700 + n, 70) for n in range(40)))
    case = dataclasses.replace(LONG_CASE, users=users, cache="none", dtype=dtype, qk_dim=128, v_dim=128)
    tokens = make_tokens(case, "cuda")
    skip_unless_done(gpu, make_call(case), kernel)

    def rows_of_the_first(company: int) -> Tensor:
        call = dataclasses.replace(assemble(case, tokens, range(company), pack_values), whole_items=True)
        out, prefixes = attention(call, kernel=kernel), int(call.offsets.query[-1])
        return torch.cat([out[:2900], out[prefixes : prefixes + 130]])

    alone = rows_of_the_first(1)
    assert all(rows_of_the_first(company).equal(alone) for company in (2, 5, 41))


@pytest.mark.parametrize("kernel", FAST_KERNELS)
@pytest.mark.parametrize("count", [129, 300, 1024, 1025, 3000])
def test_many_users(gpu: GpuBackend, kernel: str, count: int) -> None:
    """Beyond 1,024 users the planner keeps its numbers in memory, and every few hundred items are another round."""
    users = tuple(User(0, n % 131, n % 131, n * 7 % 70) for n in range(count))
    call = make_call(dataclasses.replace(GRAPH_CASE, users=users))
    skip_unless_done(gpu, call, kernel)
    out = torch.full_like(call.empty_output(torch.float16), float("nan"))
    attention(call, kernel=kernel, out=out)
    oracle = attention(call, kernel="fp32", output_dtype=torch.float32)
    assert out.isfinite().all()
    assert (out.float() - oracle).norm() <= 1e-3 * oracle.norm()


@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_calls_on_two_streams_do_not_meet(gpu: GpuBackend, kernel: str) -> None:
    calls = [make_call(dataclasses.replace(GRAPH_CASE, seed=seed)) for seed in range(2)]
    skip_unless_done(gpu, calls[0], kernel)
    expected = [attention(call, kernel=kernel) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[tuple[int, Tensor]] = []
    for _ in range(20):
        for n, call in enumerate(calls):
            with torch.cuda.stream(streams[n]):
                results.append((n, attention(call, kernel=kernel)))
    torch.cuda.synchronize()
    assert all(result.equal(expected[n]) for n, result in results)


@pytest.mark.parametrize("kernel", ["auto", *FAST_KERNELS, "fp32"])
@pytest.mark.parametrize("tokens", [4000, 16_000])
def test_nothing_is_allocated_but_output_and_workspace(
    gpu: GpuBackend, library: KernelLibrary, kernel: str, tokens: int
) -> None:
    """The views of a uvqk tensor are read where they are. How workspace grows is tested without a GPU."""
    case = dataclasses.replace(GRAPH_CASE, layout="uvqk", heads=4, users=(User(0, tokens, tokens, 96),))
    call = make_call(case)
    skip_unless_done(gpu, call, kernel)
    out = call.empty_output(torch.float16)
    attention(call, out=out, kernel=kernel)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    attention(call, out=out, kernel=kernel)
    # As asked for: what the allocator gives is rounded up.
    memory = torch.cuda.memory_stats()
    taken = memory["requested_bytes.all.peak"] - memory["requested_bytes.all.current"]
    assert 0 < taken <= library.workspace_size(call.params(out), kernel) + 512


@pytest.mark.parametrize("kernel", FAST_KERNELS)
def test_a_chosen_kernel_that_cannot_raises_its_sentence(gpu: GpuBackend, kernel: str) -> None:
    call = make_call(dataclasses.replace(GRAPH_CASE, dtype="fp32"))
    with pytest.raises(HstuTrtError, match=f"{kernel}: "):
        attention(call, kernel=kernel)
    assert attention(call).dtype == DTYPES["fp32"]


def test_an_empty_batch_is_an_empty_output(gpu: GpuBackend) -> None:
    call = make_call(dataclasses.replace(GRAPH_CASE, users=()))
    assert attention(call).shape == (0, 2, 64)
