"""Cases of the kernel benchmark against brute force and against the figures that their sources give."""

import math

import numpy as np
import pytest
import torch

from hstu_trt.bench.kernels.cases import (
    MEMORY_BYTES_PER_S,
    SHORT_HISTORIES,
    KernelCase,
    all_cases,
    select_cases,
    sweep_cases,
    table_cases,
)
from hstu_trt.bench.kernels.variants import parse_variant, parse_variants
from hstu_trt.contract.errors import ConfigError
from hstu_trt.export.attention import MaskOptions, valid_pairs

CASES = {case.name: case for case in all_cases()}

# case -> microseconds of the tensor cores fp16 and fp8, of SiLU, of memory fp16 and fp8
FLOORS = {
    "B1 4x128": (87, 44, 44, 13, 8),
    "B4 4x128": (350, 175, 175, 53, 33),
    "B16 4x128": (1398, 699, 699, 212, 133),
    "B4 8x64": (350, 175, 350, 53, 33),
    "B4 2x256": (350, 175, 87, 53, 33),
    "M-FALCON B16 2048q 4x128": (509, 254, 254, 130, 71),
    "M-FALCON B16 128q 4x128": (32, 16, 16, 85, 43),
    "SH B128 4x128": (3, 1.6, 1.6, 23.5, 14.7),
}


def test_the_table_has_the_cases_of_the_report() -> None:
    assert {case.name for case in table_cases()} == set(FLOORS)
    assert len(CASES) == len(all_cases())


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name: str) -> None:
    fp16, fp8 = (CASES[name].floors(dtype) for dtype in ("fp16", "fp8"))
    found = (fp16.tensor_us, fp8.tensor_us, fp16.mufu_us, fp16.memory_us, fp8.memory_us)
    for actual, expected in zip(found, FLOORS[name], strict=True):
        assert actual == pytest.approx(expected, rel=0.01, abs=0.6)
    limit, what = fp8.limit
    assert limit == max(found[1], found[2], found[4]) and what in ("tensor", "MUFU", "memory")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("histories", "candidates"), [((5, 3, 1), 4), ((7,), 0), ((0, 2), 3), ((33,), 1)])
def test_pairs_are_those_of_the_mask(histories: tuple[int, ...], candidates: int, cached: bool) -> None:
    case = KernelCase(name="x", histories=histories, candidates=candidates, heads=3, dim=8, cached=cached)
    queries = [torch.arange(n if cached else 0, n + candidates) for n in histories]
    masks = [valid_pairs(q, n, candidates, MaskOptions()) for q, n in zip(queries, histories, strict=True)]
    assert case.pairs == sum(int(mask.sum()) for mask in masks)
    assert case.query_rows == sum(len(mask) for mask in masks)
    assert case.key_rows == sum(mask.shape[1] for mask in masks)
    assert case.flops == 4 * 8 * 3 * case.pairs
    assert case.longest == max(histories) + candidates


def test_bytes_count_each_tensor_once() -> None:
    case = KernelCase(name="x", histories=(5, 3), candidates=2, heads=3, dim=8)
    tensor = 12 * 3 * 8
    assert case.bytes_moved("fp16") == 4 * 2 * tensor
    assert case.bytes_moved("fp8") == 3 * tensor + 2 * tensor
    cached = KernelCase(name="x", histories=(5, 3), candidates=2, heads=3, dim=8, cached=True)
    assert cached.bytes_moved("bf16") == 2 * 3 * 8 * (2 * 4 + 2 * 12)
    assert cached.floors("bf16").memory_us == pytest.approx(cached.bytes_moved("bf16") / MEMORY_BYTES_PER_S * 1e6)


def test_short_histories_are_the_draw_of_the_measurements() -> None:
    lengths = np.sort(SHORT_HISTORIES)
    assert SHORT_HISTORIES[0] == 1024 and len(lengths) == 128
    assert (lengths.sum(), lengths[64], lengths[int(0.95 * 128)], lengths.max()) == (8137, 37, 184, 1024)
    z = torch.randn(128, generator=torch.Generator().manual_seed(7)).double()
    drawn = torch.exp(math.log(40) + 0.93 * z).round().long().tolist()
    assert [1024, *drawn[1:]] == list(SHORT_HISTORIES)


def test_the_sweep_keeps_the_history_tokens() -> None:
    assert {case.prefix_rows for case in sweep_cases()} == {65536}
    assert {(case.histories[0], case.candidates) for case in sweep_cases()} == {
        (length, candidates) for length in (512, 1024, 2048, 4096, 8192, 16384) for candidates in (0, 2048)
    }


def test_cases_are_selected_by_name_and_group() -> None:
    assert select_cases(["sweep"]) == sweep_cases()
    assert [case.name for case in select_cases(["B4 2x256", "B1 4x128"])] == ["B1 4x128", "B4 2x256"]
    with pytest.raises(ConfigError, match=r"unknown case 'B5'.* 'B4 4x128'"):
        select_cases(["B5"])


@pytest.mark.parametrize("text", ["fp16", "bf16", "fp8 packed", "smxx fp16", "sm90 fp8 packed planned", "fp32 bf16"])
def test_variants_are_spelled_one_way(text: str) -> None:
    assert parse_variant(text).name == text


def test_every_variant_of_a_case_is_one() -> None:
    for case in all_cases():
        assert [parse_variant(variant).name for variant in case.variants] == list(case.variants)


@pytest.mark.parametrize(
    "text", ["", "fp32", "packed fp8", "fp8 planned packed", "fp16 packed", "fp16 fast", "sm89 fp16"]
)
def test_wrong_variants_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="variant"):
        parse_variant(text)


def test_reuse_plan_adds_twins() -> None:
    names = [variant.name for variant in parse_variants(["fp16", "fp8 packed"], reuse_plan=True)]
    assert names == ["fp16", "fp8 packed", "fp16 planned", "fp8 packed planned"]
    assert len(parse_variants(["fp16", "fp16 planned"], reuse_plan=True)) == 2
