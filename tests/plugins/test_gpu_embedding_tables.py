"""Lookups in quantised, hashed, overlaid and exchanged tables on a GPU, against the host tier: the same bits."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_tables import STORED, folder_arrays, gpu_status, host_answer, same_bits, to_device, with_rule, write_folder
from id_rules import HIGHEST, IDS, LOWEST, PERMUTATION, RULES, VECTORS
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.errors import InputError
from hstu_trt.plugins.embedding import LookupOptions, LookupReport, lookup_padded, lookup_tables
from hstu_trt.plugins.embedding_tables import DeviceTable, LiveTables, Overlay
from hstu_trt.plugins.library import KernelLibrary
from hstu_trt.tables.ids import POLICIES, RowStatus
from hstu_trt.tables.table_arrays import TableArrays

pytestmark = pytest.mark.gpu

DIMS = (1, 3, 8, 20, 64, 100, 128, 512, 520, 1032)
OUTPUTS = {"float16": torch.float16, "float32": torch.float32}


def some_rows(rows: int, dim: int, seed: int = 0) -> NDArray:
    """Rows of very different size, one of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, dim)) * np.exp2(rng.integers(-20, 12, (rows, 1)))
    values[rows // 2] = 0
    return values.astype(np.float32)


def many_ids(rows: int, count: int, seed: int = 1) -> NDArray:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rows, count)
    ids[::7] = rng.choice([-1, -2, rows, rows + 1, LOWEST, HIGHEST, 2**31, -(2**31)], len(ids[::7]))
    return ids


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], TableArrays]:
    """By dtype and width: 61 rows, several shards."""
    folder = tmp_path_factory.mktemp("tables")
    tables = {f"{dtype}.{dim}": (some_rows(61, dim), dtype) for dtype in STORED for dim in DIMS}
    write_folder(folder, tables)
    return {(dtype, dim): folder_arrays(folder, f"{dtype}.{dim}") for dtype in STORED for dim in DIMS}


def gpu_answer(table: DeviceTable, ids: NDArray, options: LookupOptions) -> tuple[Tensor, NDArray, int]:
    on_device = torch.from_numpy(ids).cuda()[:, None]
    report = LookupReport(
        status=torch.full((len(ids), 1), 99, dtype=torch.uint8, device="cuda"),
        bad_ids=torch.zeros(1, dtype=torch.int64, device="cuda"),
    )
    out = torch.full((len(ids), table.dim), 7.0, dtype=options.output_dtype, device="cuda")
    lookup_tables(on_device, [table], options, report, out=out)
    assert report.status is not None and report.bad_ids is not None
    return out, report.status[:, 0].cpu().numpy(), int(report.bad_ids.item())


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", STORED)
def test_rows_have_the_bits_of_the_host_tier(
    library: KernelLibrary, stored: dict[tuple[str, int], TableArrays], dtype: str, output: str
) -> None:
    for dim in DIMS:
        arrays = stored[dtype, dim]
        table = to_device(arrays)
        for count in (0, 1, 5, 33, 1000, 9048):
            ids = many_ids(61, count)
            expected = host_answer(arrays, ids, "zero", None, output)
            found = gpu_answer(table, ids, LookupOptions(output_dtype=OUTPUTS[output]))
            assert same_bits(found[0], expected[0]), (dim, count)
            assert np.array_equal(found[1], gpu_status(arrays, ids, "zero", None))
            assert found[2] == expected[2]


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_bfloat16_rows_come_out(library: KernelLibrary, stored: dict[tuple[str, int], TableArrays], dtype: str) -> None:
    ids = many_ids(61, 200)
    expected = torch.from_numpy(host_answer(stored[dtype, 128], ids, "zero", None, "float32")[0]).bfloat16()
    found = gpu_answer(to_device(stored[dtype, 128]), ids, LookupOptions(output_dtype=torch.bfloat16))
    assert torch.equal(found[0].cpu(), expected)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("padding_id", [None, -1, 5])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("hashing", RULES)
def test_ids_lead_to_the_rows_of_the_host_tier(
    library: KernelLibrary, stored: dict[tuple[str, int], TableArrays], hashing: str, policy, padding_id, wide: bool
) -> None:
    rule, permutation = RULES[hashing]
    ids = np.asarray([i for i in IDS if wide or abs(i) < 2**31], np.int64 if wide else np.int32)
    for dtype in ("float16", "int8"):
        arrays = with_rule(stored[dtype, 20], rule, permutation)
        expected = host_answer(arrays, ids, policy, padding_id, "float16")
        options = LookupOptions(policy=policy, padding_id=padding_id, output_dtype=torch.float16)
        found = gpu_answer(to_device(arrays), ids, options)
        assert same_bits(found[0], expected[0])
        assert np.array_equal(found[1], gpu_status(arrays, ids, policy, padding_id))
        assert found[2] == expected[2]


def test_a_permutation_that_leads_outside_of_the_table(library: KernelLibrary) -> None:
    table = DeviceTable(
        hot=torch.ones(5, 8, device="cuda"),
        hash="permutation",
        row_of_id=torch.from_numpy(PERMUTATION.astype(np.int32)).cuda(),
    )
    found = gpu_answer(table, np.arange(8), LookupOptions())
    assert found[0][:, 0].tolist() == [1, 1, 1, 1, 0, 0, 1, 0]
    assert found[2] == 3


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_table_answers_zeros(library: KernelLibrary, policy) -> None:
    for hashing in ("none", "splitmix64"):
        table = DeviceTable(hot=torch.ones(0, 8, device="cuda"), hash=hashing, default_row=None)
        rows, status, bad = gpu_answer(table, np.asarray([0, 1, LOWEST, HIGHEST]), LookupOptions(policy=policy))
        assert not rows.any()
        assert bad == 4 and set(status) == {RowStatus.BAD_ID}


def test_the_hash_has_the_vectors_of_all_languages(library: KernelLibrary) -> None:
    """Nothing but the expected row is there: it answers 1."""
    one = torch.ones(1, 1, device="cuda")
    for id_, seed, rows, _, row in VECTORS:
        overlay = Overlay.build(np.asarray([row]), one)
        table = DeviceTable(hot=one[:0], rows=rows, hash="splitmix64", seed=seed, overlay=overlay)
        found = gpu_answer(table, np.asarray([id_]), LookupOptions())
        assert found[0].item() == 1.0, (id_, seed, rows)


def test_tables_of_all_types_side_by_side(library: KernelLibrary, stored: dict[tuple[str, int], TableArrays]) -> None:
    for dims in ((128, 512, 64, 8), (1, 3, 100, 520), (512, 1032, 20, 128)):
        parts = [stored[dtype, dim] for dtype, dim in zip(STORED, dims, strict=True)]
        ids = np.stack([many_ids(61, 500, seed) for seed in range(4)], axis=1)
        status = torch.full((500, 4), 99, dtype=torch.uint8, device="cuda")
        bad = torch.zeros(4, dtype=torch.int64, device="cuda")
        report = LookupReport(status=status, bad_ids=bad)
        options = LookupOptions(output_dtype=torch.float16)
        found = lookup_tables(torch.from_numpy(ids).cuda(), [to_device(part) for part in parts], options, report)
        expected = [host_answer(part, ids[:, k], "zero", None, "float16") for k, part in enumerate(parts)]
        assert same_bits(found, np.concatenate([one[0] for one in expected], axis=1))
        wanted = [gpu_status(part, ids[:, k], "zero", None) for k, part in enumerate(parts)]
        assert np.array_equal(status.cpu().numpy(), np.stack(wanted, axis=1))
        assert bad.tolist() == [one[2] for one in expected]


@pytest.mark.parametrize("dtype", STORED)
def test_cold_rows_are_the_same_rows(
    library: KernelLibrary, stored: dict[tuple[str, int], TableArrays], dtype: str
) -> None:
    ids = many_ids(61, 3000)
    for dim in (1, 20, 128, 512):
        arrays = stored[dtype, dim]
        expected = host_answer(arrays, ids, "clamp", -2, "float16")
        for hot_rows in (0, 1, 30, 61):
            options = LookupOptions(policy="clamp", padding_id=-2, output_dtype=torch.float16)
            found = gpu_answer(to_device(arrays, hot_rows=hot_rows), ids, options)
            assert same_bits(found[0], expected[0])
            assert np.array_equal(found[1], gpu_status(arrays, ids, "clamp", -2, hot_rows))


@pytest.mark.parametrize("dtype", STORED)
def test_an_overlay_stands_in_for_rows_and_adds_some(
    library: KernelLibrary, stored: dict[tuple[str, int], TableArrays], tmp_path: Path, dtype: str
) -> None:
    old, new = some_rows(61, 20), some_rows(70, 20, seed=2)
    changed = np.asarray([0, 3, 17, 60, *range(61, 70)])
    new[:61][~np.isin(np.arange(61), changed)] = old[~np.isin(np.arange(61), changed)]
    write_folder(tmp_path, {"old": (old, dtype), "new": (new, dtype)})
    before, after = (folder_arrays(tmp_path, name) for name in ("old", "new"))
    whole = to_device(after)
    overlay = Overlay.build(
        changed, whole.hot[torch.from_numpy(changed).cuda()],
        None if whole.scales is None else whole.scales[torch.from_numpy(changed).cuda()],
    )  # fmt: skip
    ids = many_ids(70, 4000)
    expected = host_answer(after, ids, "zero", None, "float16")
    for hot_rows in (None, 10):
        base = to_device(before, hot_rows=hot_rows)
        table = DeviceTable(hot=base.hot, cold=base.cold, scales=base.scales, rows=70, overlay=overlay)
        found = gpu_answer(table, ids, LookupOptions(output_dtype=torch.float16))
        assert same_bits(found[0], expected[0])
    missing = DeviceTable(hot=base.hot, cold=base.cold, scales=base.scales, rows=70)
    rows, status, bad = gpu_answer(missing, np.asarray([60, 61, 69, 70]), LookupOptions())
    assert status.tolist() == [RowStatus.HOST, RowStatus.MISSING, RowStatus.MISSING, RowStatus.BAD_ID]
    assert bad == 1 and not rows[1:].any()


def test_padded_sequences(library: KernelLibrary) -> None:
    table = DeviceTable(hot=torch.randn(100, 24, device="cuda"))
    ids = torch.randint(0, 100, (5, 7), device="cuda")
    lengths = torch.tensor([7, 0, 3, 1, 9], dtype=torch.int32, device="cuda")
    rows = lookup_padded(ids, lengths, table)
    inside = torch.arange(7, device="cuda")[None] < lengths[:, None]
    assert torch.equal(rows, torch.where(inside[..., None], table.hot[ids], 0.0))


def version(number: int, rows: int = 997, dim: int = 64) -> DeviceTable:
    """Every value is the version's number."""
    return DeviceTable(hot=torch.full((rows, dim), float(number), device="cuda"), version=number)


def test_a_captured_graph_sees_exchanged_tables(library: KernelLibrary) -> None:
    live = LiveTables((version(1), version(1, dim=8)))
    ids = torch.randint(0, 997, (3000, 2), device="cuda")
    latch = live.word.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plain = lookup_tables(ids, live)
        latched = lookup_tables(ids, live, latch=latch)
    for number in range(2, 6):
        live.publish([version(number), version(number, dim=8)])
        graph.replay()
        assert torch.equal(plain, torch.full_like(plain, number)) and torch.equal(latched, plain)
    live.roll_back()
    graph.replay()
    assert torch.equal(plain, torch.full_like(plain, 4.0)) and torch.equal(latched, plain)
    with pytest.raises(InputError, match="same types and widths"):
        live.publish([version(9), version(9, dim=9)])


def test_random_interleavings_of_lookups_and_exchanges(library: KernelLibrary) -> None:
    rng = np.random.default_rng(5)
    live, number = LiveTables((version(0),)), 0
    for _ in range(100):
        step = rng.integers(3)
        if step == 0:
            number += 1
            live.publish([version(number)])
        elif step == 1 and live._previous is not None:
            live.roll_back()
        ids = torch.randint(0, 997, (int(rng.integers(1, 5000)), 1), device="cuda")
        rows = lookup_tables(ids, live)
        assert torch.equal(rows, torch.full_like(rows, live.tables[0].version))


def test_every_lookup_sees_one_version_while_another_stream_exchanges(library: KernelLibrary) -> None:
    live, stop = LiveTables((version(0),)), threading.Event()

    def exchange() -> None:
        number = 1
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                live.publish([version(number)])
                torch.cuda.current_stream().synchronize()
                number += 1

    thread = threading.Thread(target=exchange)
    ids, latch, seen = torch.randint(0, 997, (200_000, 1), device="cuda"), live.word.clone(), set()
    thread.start()
    try:
        for _ in range(300):
            rows = lookup_tables(ids, live, latch=latch)
            low, high = torch.aminmax(rows)
            assert low.item() == high.item()
            seen.add(low.item())
    finally:
        stop.set()
        thread.join()
    assert len(seen) > 3
