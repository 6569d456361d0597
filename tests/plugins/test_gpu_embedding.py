"""The embedding lookup on a GPU, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hstu_trt.export import torch_ops as export_ops
from hstu_trt.plugins import embedding, torch_ops
from hstu_trt.plugins.library import KernelLibrary

pytestmark = pytest.mark.gpu

TABLE_TYPES = [torch.float16, torch.float32, torch.bfloat16]
OUTPUT_TYPES = [torch.float16, torch.float32]


def some_ids(count: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Most of them in the table, a seventh before it, behind it or far away."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, rows, (count,), generator=generator)
    ids[3::21], ids[10::21], ids[17::21] = -1, rows, torch.iinfo(torch.int32).max
    return ids.to("cuda", dtype)


@pytest.mark.parametrize("table_type", TABLE_TYPES)
@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
@pytest.mark.parametrize("id_type", [torch.int32, torch.int64])
def test_rows_are_those_of_the_table(
    library: KernelLibrary, table_type: torch.dtype, output_type: torch.dtype, id_type: torch.dtype
) -> None:
    for dim in (1, 2, 3, 4, 7, 8, 9, 31, 32, 64, 100, 127, 256, 512, 1000):
        for count in (0, 1, 5, 257, 5000):
            table = torch.randn(211, dim).to("cuda", table_type)
            ids = some_ids(count, 211, id_type)
            rows = embedding.lookup(ids, table, output_type)
            expected = export_ops.embedding_lookup._init_fn(ids.long(), table, "", output_type)
            assert rows.dtype == output_type
            assert torch.equal(rows, expected), (dim, count)


@pytest.mark.parametrize("table_type", TABLE_TYPES)
def test_rows_that_are_not_aligned(library: KernelLibrary, table_type: torch.dtype) -> None:
    memory = torch.randn(50 * 16 + 1).to("cuda", table_type)
    table = memory[1:].view(50, 16)
    ids = some_ids(99, 50, torch.int64)
    expected = export_ops.embedding_lookup._init_fn(ids, table, "", torch.float32)
    assert torch.equal(embedding.lookup(ids, table, torch.float32), expected)


def test_very_wide_rows(library: KernelLibrary) -> None:
    for dim in (8192, 16384, 24576, 100_000):
        table = torch.randn(9, dim, device="cuda", dtype=torch.float16)
        ids = torch.tensor([3, 8, 0, 9, 3], device="cuda")
        expected = export_ops.embedding_lookup._init_fn(ids, table, "", torch.float16)
        assert torch.equal(embedding.lookup(ids, table, torch.float16), expected), dim


def test_an_empty_table_answers_zeros(library: KernelLibrary) -> None:
    ids = torch.arange(-2, 5, device="cuda")
    rows = embedding.lookup(ids, torch.empty(0, 12, device="cuda"), torch.float32)
    assert torch.equal(rows, torch.zeros(7, 12, device="cuda"))


def test_a_table_behind_four_gigabytes(library: KernelLibrary) -> None:
    rows, dim = 5_000_000, 512
    table = torch.zeros(rows, dim, dtype=torch.float16, device="cuda")
    table[-1] = 3.0
    ids = torch.tensor([rows - 1, 0, rows], device="cuda")
    assert embedding.lookup(ids, table, torch.float16).float().mean(dim=1).tolist() == [3.0, 0.0, 0.0]


def test_the_op_runs_on_the_kernel_in_a_graph(library: KernelLibrary) -> None:
    assert torch_ops.embedding_lookup is not None
    table = torch.randn(100, 64, device="cuda", dtype=torch.float16)
    ids = some_ids(77, 100, torch.int32)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = torch.ops.hstu_trt.embedding_lookup(ids, table, "item_id", torch.float32)
    for seed in range(3):
        ids.copy_(some_ids(77 + seed, 100, torch.int32)[:77])
        graph.replay()
        expected = export_ops.embedding_lookup._init_fn(ids.long(), table, "item_id", torch.float32)
        assert torch.equal(rows, expected)
