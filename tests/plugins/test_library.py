"""The C face without a GPU: the mirror of its parameters, what calls it refuses in which words, workspace sizes."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.plugins.library import (
    DATA_TYPES,
    KERNELS,
    LIBRARY_VARIABLE,
    ROOT,
    TABLE_TYPES,
    AttentionParams,
    EmbeddingColumns,
    EmbeddingParams,
    EmbeddingTable,
    KernelError,
    KernelLibrary,
    TokenTensor,
)

SOURCES = ROOT / "plugins/csrc/kernels/attention"
ADDRESS = 1 << 20


def valid_params(**changes: Any) -> AttentionParams:
    """A call that every kernel can do, on addresses that nobody reads, with changes."""
    rows = TokenTensor(ADDRESS, 256, 64)
    params = AttentionParams(
        q=rows, k=rows, v=rows, out=rows,
        query_offsets=ADDRESS, prefix_offsets=ADDRESS, candidate_offsets=ADDRESS,
        norm=ADDRESS, norm_count=1,
        users=2, heads=4, qk_dim=64, v_dim=64, query_rows=100, key_rows=100,
        type=DATA_TYPES["float16"], output_type=DATA_TYPES["float16"],
        alpha=0.1, causal=1, candidate_group_size=1,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(params, name, value)
    return params


def test_the_mirror_is_the_structs(library: KernelLibrary) -> None:
    assert library.layout_differences() == []


def test_a_shifted_mirror_is_noticed(library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = (("q", ctypes.c_int32), *AttentionParams._fields_[1:])

    monkeypatch.setattr("hstu_trt.plugins.library.AttentionParams", Shifted)
    differences = library.layout_differences()
    assert any("field q" in text for text in differences)
    assert any("parameters of" in text for text in differences)
    with pytest.raises(ArtefactError, match="is of other sources"):
        KernelLibrary(library.path)


def enum_values(header: str, name: str) -> dict[str, int]:
    body = re.search(rf"enum class {name} [^{{]*{{(.*?)}}", (SOURCES / header).read_text(), re.DOTALL)
    assert body
    return {key.lower(): int(value) for key, value in re.findall(r"\bk(\w+) = (\d)", body[1])}


def test_names_are_the_enums() -> None:
    kernels = enum_values("attention.h", "AttentionKernel")
    types = enum_values("../common/data_type.h", "DataType")
    kernels["fp32"] = kernels.pop("float32")
    types["float8_e4m3fn"] = types.pop("float8e4m3")
    assert kernels == KERNELS
    assert types == TABLE_TYPES


FP8 = {
    "type": DATA_TYPES["float8_e4m3fn"], "q_scale": ADDRESS, "k_scale": ADDRESS, "v_scale": ADDRESS, "scale_count": 1,
}  # fmt: skip
BIAS = {
    "position_bias": ADDRESS, "time_bias": ADDRESS, "query_timestamps": ADDRESS, "key_timestamps": ADDRESS,
    "position_bias_count": 9, "time_bias_count": 9,
}  # fmt: skip
ROWS, ODD = TokenTensor(ADDRESS, 256, 64), TokenTensor(ADDRESS + 2, 257, 64)
CACHE = {"cached_k": ROWS, "cached_v": ROWS, "cached_offsets": ADDRESS, "cached_rows": 256}
PAGES = {**CACHE, "page_table": ADDRESS, "page_size": 128, "pages_per_user": 2}
# fp8 values whose rows cannot be read four columns at a time.
UNPACKABLE: list[dict[str, Any]] = [
    {"v": TokenTensor(ADDRESS + 2, 256, 64)},
    {"v": TokenTensor(ADDRESS, 257, 64)},
    {"v": TokenTensor(ADDRESS, 256, 62)},
    {"v_dim": 62},
]

# (kernel, compute capability, changes to a valid call)
REFUSED: list[tuple[str, int, dict[str, Any]]] = [
    *(("auto", 90, {name: -1}) for name in ("users", "query_rows", "key_rows", "cached_rows", "max_attn_len")),
    *(("auto", 90, {name: 0}) for name in ("heads", "qk_dim", "v_dim", "candidate_group_size")),
    *(("auto", 90, {name: None}) for name in ("query_offsets", "prefix_offsets", "candidate_offsets", "norm")),
    ("auto", 90, {"norm_count": 3}),
    ("auto", 90, {"attn_scale": ADDRESS, "attn_scale_count": 3}),
    ("auto", 90, {"output_type": DATA_TYPES["float8_e4m3fn"]}),
    ("auto", 90, {**FP8, "k_scale": None}),
    ("auto", 90, {**FP8, "scale_count": 3}),
    ("auto", 90, {**BIAS, "key_timestamps": None}),
    ("auto", 90, {**BIAS, "time_bias_count": 0}),
    ("auto", 90, {**CACHE, "cached_v": TokenTensor()}),
    ("auto", 90, {**CACHE, "cached_offsets": None}),
    ("auto", 90, {"cached_offsets": ADDRESS}),
    ("auto", 90, {"packed_values": 1}),
    ("auto", 90, {**PAGES, "page_size": 0}),
    ("auto", 90, {**BIAS, **CACHE}),
    ("fp32", 90, {**FP8, **PAGES, "page_size": 64}),
    ("fp32", 90, {"query_rows": 2**31 - 1}),
    ("sm90", 80, {}),
    ("sm90", 120, {}),
    ("sm90", 90, {"type": DATA_TYPES["float32"]}),
    ("sm90", 90, {"v_dim": 128}),
    ("sm90", 90, {"qk_dim": 32, "v_dim": 32}),
    ("sm90", 90, {"causal": 0}),
    ("sm90", 90, BIAS),
    ("sm90", 90, {"candidate_group_size": 3}),
    *(("sm90", 90, {name: ODD}) for name in ("q", "k", "v", "out")),
    ("sm90", 90, {**CACHE, "cached_k": ODD}),
    ("sm90", 90, {**FP8, **PAGES, "page_size": 64}),
    ("sm90", 90, {**PAGES, "page_size": 32}),
    ("smxx", 75, {}),
    ("smxx", 80, FP8),
    ("smxx", 90, {"type": DATA_TYPES["float32"]}),
    ("smxx", 90, {"qk_dim": 36}),
    ("smxx", 90, {"causal": 0}),
    *(("smxx", 90, {name: ODD}) for name in ("q", "k", "v", "out")),
    *((kernel, 90, {**FP8, **change}) for kernel in ("sm90", "smxx") for change in UNPACKABLE),
    ("smxx", 90, {**CACHE, "cached_v": ODD}),
    ("smxx", 90, {**BIAS, **CACHE}),
    ("smxx", 90, {**FP8, **PAGES, "page_size": 64}),
    ("smxx", 90, {**PAGES, "page_size": 96}),
]


@pytest.mark.parametrize(("kernel", "capability", "changes"), REFUSED)
def test_what_cannot_be_done_is_said(
    library: KernelLibrary, kernel: str, capability: int, changes: dict[str, Any]
) -> None:
    sentence = library.unsupported(valid_params(**changes), kernel, capability)
    assert sentence is not None
    assert re.fullmatch(r"[ -~]{15,120}", sentence) and " " in sentence and not sentence.endswith(".")


# Kernels guard themselves too against what dispatch.cu has refused before it asks them.
SAID_BEFORE = re.compile(r"the output must be|candidate_group_size must be at least 1|built without")


def test_every_sentence_is_said_by_some_call(library: KernelLibrary) -> None:
    said = {library.unsupported(valid_params(**changes), kernel, gpu) for kernel, gpu, changes in REFUSED}
    literals = [
        text for path in SOURCES.glob("*.cu") for text in re.findall(r'return "([^"]+ [^"]+)";', path.read_text())
    ]
    assert literals
    assert [text for text in literals if text not in said and not SAID_BEFORE.search(text)] == []


@pytest.mark.parametrize("change", UNPACKABLE)
def test_values_that_cannot_be_packed_go_to_the_oracle(library: KernelLibrary, change: dict[str, Any]) -> None:
    said = {library.unsupported(valid_params(**FP8, **change), kernel, 90) for kernel in ("sm90", "smxx")}
    assert said == {"fp8 values that are not packed must be 4-byte aligned, v_dim and their strides multiples of 4"}
    assert library.unsupported(valid_params(**FP8, **change), "fp32", 90) is None
    assert library.unsupported(valid_params(**FP8, **change), "auto", 90) is None


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_plain_call_can_be_done(library: KernelLibrary, kernel: str) -> None:
    if kernel == "sm90" and "90a" not in library.archs:
        pytest.skip("the library was built without sm90")
    assert library.unsupported(valid_params(), kernel, 90) is None


@pytest.mark.parametrize("changes", [{}, FP8, CACHE, PAGES, BIAS, {"qk_dim": 48, "v_dim": 24}, {"causal": 0}])
@pytest.mark.parametrize("capability", [80, 90])
def test_some_kernel_takes_every_option(library: KernelLibrary, changes: dict[str, Any], capability: int) -> None:
    if not {str(capability), f"{capability}a"} & set(library.archs):
        pytest.skip(f"the library was built for {', '.join(library.archs)}")
    assert library.unsupported(valid_params(**changes), "auto", capability) is None


@pytest.mark.parametrize("capability", [70, 75, 91, 130])
def test_a_gpu_that_was_not_built_for_is_refused(library: KernelLibrary, capability: int) -> None:
    assert "built for compute capability" in (library.unsupported(valid_params(), "fp32", capability) or "")


def test_whole_items_need_no_room_for_sums(library: KernelLibrary) -> None:
    whole, split = (library.workspace_size(valid_params(whole_items=whole), "sm90") for whole in (1, 0))
    if "90a" in library.archs:
        assert 0 < whole < split - 1_000_000


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("field", ["users", "query_rows", "key_rows", "heads"])
@pytest.mark.parametrize("changes", [{}, FP8])
def test_more_work_never_takes_less_workspace(
    library: KernelLibrary, kernel: str, field: str, changes: dict[str, Any]
) -> None:
    sizes = [library.workspace_size(valid_params(**{**changes, field: n}), kernel) for n in (1, 2, 7, 64, 1000, 9000)]
    assert sizes == sorted(sizes)
    assert sizes[-1] < 2**31


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_workspace_hardly_grows_with_the_tokens(library: KernelLibrary, kernel: str, dim: int) -> None:
    """80 bytes per 64 rows, and sums of split items up to a bound."""

    def size(rows: int) -> int:
        return library.workspace_size(
            valid_params(users=1, qk_dim=dim, v_dim=dim, query_rows=rows, key_rows=rows), kernel
        )  # fmt: skip

    assert size(1_000_000) - size(100) <= 1_000_000
    assert size(100) <= 40_000_000


def test_value_blocks_are_those_of_the_header(library: KernelLibrary) -> None:
    from hstu_trt.plugins.parameters import value_blocks

    shapes = [(0, 0), (0, 3), (127, 1), (128, 1), (1000, 5)]
    assert [library.value_blocks(*shape) for shape in shapes] == [value_blocks(*shape) for shape in shapes]


def test_a_failed_launch_names_cudas_error(library: KernelLibrary) -> None:
    with pytest.raises(KernelError, match=r"pack_values: cudaError\w+: .*built for"):
        library.raise_on(1, "pack_values")


def valid_lookup(**changes: Any) -> EmbeddingParams:
    """A lookup that can be done, on addresses that nobody reads, with changes of the call, its columns or the table."""
    half = DATA_TYPES["float16"]
    params = EmbeddingParams(out=ADDRESS, out_stride=8, count=6, policy=1, output_type=half, column_count=1)
    params.columns[0] = EmbeddingColumns(
        ids=ADDRESS, id_stride=1, dim=8, type=half,
        table=EmbeddingTable(hot=ADDRESS, scales=ADDRESS, rows=10, hot_rows=10, default_row=-1),
    )  # fmt: skip
    columns = params.columns[0]
    for name, value in changes.items():
        home = next(one for one in (params, columns, columns.table) if hasattr(one, name))
        setattr(home, name, value)
    return params


INT8 = TABLE_TYPES["int8"]
REFUSED_LOOKUPS: list[dict[str, Any]] = [
    {"count": -1},
    {"count": 2**31},
    {"column_count": 0},
    {"column_count": 9},
    {"output_type": DATA_TYPES["float8_e4m3fn"]},
    {"policy": 5},
    {"lengths": ADDRESS, "padded_length": 4},
    {"lengths": ADDRESS, "padded_length": 0},
    {"latch": ADDRESS},
    {"out": None},
    {"ids": None},
    {"dim": 0},
    {"first": 1},
    {"type": 5},
    {"rows": -1},
    {"cold_rows": -1},
    {"hot": None},
    {"cold_rows": 1},
    {"direct_rows": 11},
    {"direct_rows": -1},
    {"type": INT8, "scales": None},
    {"hash": 3},
    {"hash": 2, "id_count": 4},
    {"default_row": -2},
    {"overlay_slots": ADDRESS, "overlay_mask": 2, "overlay": ADDRESS},
    {"overlay_slots": ADDRESS, "overlay_mask": 3},
    {"overlay_slots": ADDRESS, "overlay_mask": 3, "overlay": ADDRESS, "type": INT8},
]


def test_lookups_that_cannot_be_done(library: KernelLibrary) -> None:
    said = [library.embedding_unsupported(valid_lookup(**changes)) for changes in REFUSED_LOOKUPS]
    assert all(sentence and re.fullmatch(r"[ -~]{15,120}", sentence) for sentence in said), said
    source = (SOURCES.parent / "embedding/embedding.cu").read_text()
    assert set(said) == set(re.findall(r'return "([^"]+ [^"]+)";', source))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"count": 0, "ids": None, "out": None},
        {"hot": None, "rows": 0, "hot_rows": 0},
        {"hot": None, "live_tables": ADDRESS, "latch": ADDRESS},
        {"type": DATA_TYPES["bfloat16"], "output_type": DATA_TYPES["float32"], "dim": 7},
        {"type": INT8, "output_type": DATA_TYPES["bfloat16"], "cold": ADDRESS, "cold_rows": 5},
        {"hash": 2, "id_count": 4, "row_of_id": ADDRESS, "policy": 4, "default_row": 3},
        {"lengths": ADDRESS, "padded_length": 3},
        {"overlay_slots": ADDRESS, "overlay_mask": 3, "overlay": ADDRESS},
    ],
)
def test_lookups_that_can_be_done(library: KernelLibrary, changes: dict[str, Any]) -> None:
    assert library.embedding_unsupported(valid_lookup(**changes)) is None


def run_with_library(path: Path) -> str:
    code = "from hstu_trt.plugins.library import load_library; load_library()"
    environment = {**os.environ, LIBRARY_VARIABLE: str(path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert result.returncode
    return result.stderr


def test_a_missing_library_names_what_makes_it(tmp_path: Path) -> None:
    assert "is not there: build the kernels with `make plugins`" in run_with_library(tmp_path / "none.so")


def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign.so").write_text("no library")
    assert "run `make plugins`" in run_with_library(tmp_path / "foreign.so")
