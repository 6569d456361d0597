"""What calls the attention refuses, in which words, and how much workspace it asks for. No GPU is needed to ask."""

from __future__ import annotations

import re
from typing import Any

import pytest

from hstu_trt.plugins.library import DATA_TYPES, KERNELS, ROOT, AttentionParams, KernelLibrary, TokenTensor

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
