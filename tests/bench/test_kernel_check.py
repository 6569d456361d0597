"""What the kernel benchmark checks with: float64 rows, value blocks, padded references, launch parameters."""

import numpy as np
import pytest
import torch

from hstu_trt.bench.kernels import calls as kernel_calls
from hstu_trt.bench.kernels import references as kernel_references
from hstu_trt.bench.kernels.calls import alpha_of, kernel_call
from hstu_trt.bench.kernels.cases import KernelCase, select_cases
from hstu_trt.bench.kernels.check import exact_rows, non_finite, query_rows, relative_l2, sample_rows
from hstu_trt.bench.kernels.inputs import Tokens, random_tokens
from hstu_trt.bench.kernels.references import Padded, build_reference, eager_attention
from hstu_trt.bench.kernels.runs import check_failure
from hstu_trt.bench.kernels.variants import REFERENCES, parse_variant
from hstu_trt.export.attention import MaskOptions, reference_attention
from hstu_trt.plugins.parameters import value_blocks

CASES = [
    KernelCase(name="mixed", histories=(7, 1, 0, 12), candidates=3, heads=2, dim=8),
    KernelCase(name="mixed cached", histories=(7, 1, 5), candidates=3, heads=2, dim=8, cached=True),
    KernelCase(name="alike", histories=(6, 6), candidates=4, heads=2, dim=8),
    KernelCase(name="alike cached", histories=(6, 6), candidates=4, heads=2, dim=8, cached=True),
    KernelCase(name="no candidates", histories=(9, 2), candidates=0, heads=1, dim=8),
]


def oracle(case: KernelCase, tokens: Tokens) -> torch.Tensor:
    """The whole output by the export room's attention, in float64."""
    prefix = torch.tensor([0, *np.cumsum(case.histories)])
    candidates = torch.arange(case.users + 1) * case.candidates
    queries = torch.zeros_like(prefix) if case.cached else prefix
    scale = torch.tensor(1 / case.longest)
    offsets = (queries, prefix, candidates)
    return reference_attention(*tokens.real(), offsets, scale, alpha=alpha_of(case), mask=MaskOptions())


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> KernelCase:
    return request.param


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8"])
def test_sampled_rows_are_the_oracle_s(case: KernelCase, dtype: str) -> None:
    tokens = random_tokens(case, 1, "cpu", dtype)
    samples = sample_rows(case, rows=9)
    exact = exact_rows(case, tokens, samples, alpha_of(case))
    expected = oracle(case, tokens)[query_rows(case, samples)]
    assert relative_l2(exact, expected) < 2e-6
    assert exact.dtype == torch.float64


def test_samples_hold_the_first_and_last_row_of_each_user(case: KernelCase) -> None:
    rows = set(query_rows(case, sample_rows(case, rows=2)).tolist())
    ends, first = set(), 0
    prefixes = [] if case.cached else list(case.histories)
    for count in [*prefixes, *[case.candidates] * case.users]:
        ends |= {first, first + count - 1} if count else set()
        first += count
    assert ends <= rows and max(rows) == case.query_rows - 1


def test_long_cases_are_sampled_with_about_600_rows() -> None:
    for case in select_cases(["B4 4x128", "M-FALCON B16 128q 4x128"]):
        rows = query_rows(case, sample_rows(case))
        assert 500 < len(rows) < 700 and len(set(rows.tolist())) == len(rows)


def test_an_error_is_relative_and_nan_is_seen() -> None:
    exact = torch.full((4, 2, 8), 2.0, dtype=torch.float64)
    assert relative_l2(exact.half() * 1.5, exact) == pytest.approx(0.5)
    output = exact.half()
    output[1, 0, 3], output[2, 0, 3] = float("nan"), float("inf")
    assert non_finite(output) == 2


@pytest.mark.parametrize(
    ("checks", "dtype", "said"),
    [
        ({"relative_l2": 2.9e-4, "non_finite": 0}, "fp16", None),
        ({"relative_l2": 3.1e-4, "non_finite": 0}, "fp16", "relative_l2 against float64 is 0.00031"),
        ({"relative_l2": float("nan"), "non_finite": 0}, "bf16", "is nan"),
        ({"relative_l2": 1e-5, "non_finite": 3}, "fp16", "3 elements of the output are not finite"),
        ({"relative_l2": 2.6e-2, "relative_l2_from_fp16": 5.4e-2, "non_finite": 0}, "fp8", None),
        ({"relative_l2": 2.6e-2, "relative_l2_from_fp16": 5.6e-2, "non_finite": 0}, "fp8", "relative_l2_from_fp16"),
    ],
)
def test_gates(checks: dict[str, float], dtype: str, said: str | None) -> None:
    sentence = check_failure(checks, dtype)
    assert sentence is None if said is None else said in (sentence or "")


def test_fp8_tokens_stand_for_the_fp16_ones() -> None:
    case = CASES[0]
    fp8, fp16 = (random_tokens(case, 1, "cpu", dtype).real() for dtype in ("fp8", "fp16"))
    for stored, token in zip(fp8, fp16, strict=True):
        assert 0 < relative_l2(stored, token) < 0.04


def test_padded_eager_attention_is_the_oracle(case: KernelCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_references, "_chunk_users", lambda case, memory: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"total_memory": 0}))
    tokens = random_tokens(case, 1, "cpu", "fp16")
    reference = build_reference("eager", case, [tokens], alpha_of(case))
    assert not isinstance(reference, str) and reference.rows is not None
    assert reference.name == REFERENCES["eager"] and reference.flops == case.flops
    assert relative_l2(reference.rows(reference.calls[0]()), oracle(case, tokens)) < 2e-3


def test_chunks_of_users_fit_the_memory() -> None:
    (case,) = select_cases(["B16 4x128"])
    users = kernel_references._chunk_users(case, 80 << 30)
    assert 1 < users < 16 and 16 % users == 0
    assert kernel_references._chunk_users(case, 1 << 30) == 1


def test_softmax_does_its_own_work() -> None:
    mixed, alike, cached = CASES[0], CASES[2], CASES[3]
    assert "different lengths" in str(build_reference("cudnn", mixed, [random_tokens(mixed, 1, "cpu", "fp16")], 1.0))
    for case, pairs in ((alike, 10 * 11 // 2), (cached, 4 * 6)):
        reference = build_reference("flash", case, [random_tokens(case, 1, "cpu", "fp16")], 1.0)
        assert not isinstance(reference, str) and reference.rows is None
        assert reference.flops == 4 * 8 * 2 * 2 * pairs
        q, k, v = reference.calls[0].args
        assert q.shape[2] == (4 if case.cached else 10) and k.shape[2] == v.shape[2] == (6 if case.cached else 10)


def test_padding_is_undone() -> None:
    padded = Padded.of(CASES[0], "cpu")
    tokens = torch.arange(CASES[0].query_rows * 4).reshape(-1, 2, 2)
    assert torch.equal(padded.scatter(padded.gather(tokens, padded.query_rows)), tokens)
    assert eager_attention(*[torch.ones(1, 1, 2, 2)] * 3, torch.eye(2), 0.0, 1.0).abs().sum() == 0


@pytest.mark.parametrize("variant", ["fp16", "bf16", "fp8", "fp8 packed"])
def test_calls(case: KernelCase, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[tuple[int, list[int], list[int]]] = []

    def pack(v: torch.Tensor, prefix: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        packed.append((len(v), prefix.tolist(), candidates.tolist()))
        return v.new_empty(2 * value_blocks(len(v), len(prefix) - 1), *v.shape[1:], 128)

    monkeypatch.setattr(kernel_calls, "pack_values", pack)
    parsed = parse_variant(variant)
    tokens = random_tokens(case, 1, "cpu", parsed.dtype)
    launch = kernel_call(case, parsed, tokens)
    call, params = launch.attention, launch.attention.params(launch.out)
    prefix = [0, *np.cumsum(case.histories).tolist()]
    own = [0] * len(prefix) if case.cached else prefix
    candidates = [case.candidates * user for user in range(case.users + 1)]
    assert [offsets.tolist() for offsets in call.offsets] == [own, own, candidates]
    assert launch.out.dtype == (torch.bfloat16 if variant == "bf16" else torch.float16)
    assert params.key_rows + params.cached_rows == case.key_rows and params.query_rows == case.query_rows
    assert params.packed_values == parsed.packed and call.norm.tolist() == [case.longest]
    assert params.alpha == pytest.approx(alpha_of(case))
    sections = [(len(call.k), own, candidates)] * parsed.packed
    if case.cached:
        assert call.cache is not None and call.cache.offsets.tolist() == prefix
        assert call.cache.k.data_ptr() == tokens.k.data_ptr()
        sections += [(case.prefix_rows, prefix, [0] * len(prefix))] * (parsed.dtype == "fp8")
    assert sorted(packed) == sorted(sections)
