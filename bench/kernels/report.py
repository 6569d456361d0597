"""The kernel benchmark's figures for people: a line per variant while it runs, and the table of docs/speed.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hstu_trt.bench.kernels.cases import DTYPES, Dtype, KernelCase, all_cases, table_cases
from hstu_trt.bench.kernels.variants import GEMM_NAMES, REFERENCES, KernelVariant, parse_variant
from hstu_trt.bench.result_rows import ResultRow, latest, sources_text
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.text import text_table

# TFLOP/s of the fastest public kernel on an H100 in November 2026, where one was measured: Meta's CUDA kernel (derived
# from FlashAttention-3; fp8 with scale 1), NVIDIA's CUTLASS kernel in FBGEMM, for `smxx` Meta's Triton kernel.
BEST_PEERS = {
    ("B4 4x128", "fp16"): 574, ("B4 4x128", "bf16"): 587, ("B4 4x128", "fp8"): 787, ("B4 4x128", "smxx fp16"): 392,
    ("B1 4x128", "fp16"): 441, ("B1 4x128", "fp8"): 555,
    ("B16 4x128", "fp16"): 573, ("B16 4x128", "fp8"): 762,
    ("B4 8x64", "fp16"): 439, ("B4 8x64", "fp8"): 510,
    ("B4 2x256", "fp16"): 586, ("B4 2x256", "fp8"): 974,
    ("M-FALCON B16 2048q 4x128", "fp16"): 528, ("M-FALCON B16 2048q 4x128", "fp8"): 495,
    ("M-FALCON B16 128q 4x128", "fp16"): 350, ("M-FALCON B16 128q 4x128", "fp8"): 246,
    ("SH B128 4x128", "fp16"): 68, ("SH B128 4x128", "fp8"): 57,
}  # fmt: skip


def our_variant(row: ResultRow) -> KernelVariant | None:
    """The variant of a row of our kernels; None for a reference's row."""
    try:
        return parse_variant(row.variant)
    except ConfigError:
        return None


def dry_run_table(cases: Sequence[KernelCase]) -> str:
    """What each case is and takes, without running it."""
    header = ("case", "users", "query rows", "key rows", "pairs", "GFLOP", "MB fp16", "MB fp8")
    floors = ("floors fp16: tensor, MUFU, memory us", "floors fp8")
    lines = []
    for case in cases:
        work = (case.users, case.query_rows, case.key_rows, case.heads * case.pairs, round(case.flops / 1e9, 1))
        moved = (round(case.bytes_moved(dtype) / 1e6, 1) for dtype in ("fp16", "fp8"))
        lines.append((case.name, *work, *moved, _floors_text(case, "fp16"), _floors_text(case, "fp8")))
    return text_table((*header, *floors), lines)


def _floors_text(case: KernelCase, dtype: Dtype) -> str:
    floors = case.floors(dtype)
    return ", ".join(time_text(us) for us in (floors.tensor_us, floors.mufu_us, floors.memory_us))


def floor_text(case: KernelCase, dtype: Dtype) -> str:
    """The floor of a case, and what sets it: ``350 us tensor``."""
    microseconds, what = case.floors(dtype).limit
    return f"{microseconds:.{1 if microseconds < 100 else 0}f} us {what}"


def case_table(rows: Iterable[ResultRow]) -> str:
    """One line per row of a case."""
    header = ("case", "variant", "us", "spread", "TFLOP/s", "GB/s", "GEMM", *_times(REFERENCES))
    return text_table((*header, "floor", "error"), [_line(row) for row in rows])


def _times(names: Iterable[str]) -> list[str]:
    return [f"x {name}" for name in names]


def _line(row: ResultRow) -> tuple[str, ...]:
    variant = our_variant(row)
    case = next((case for case in all_cases() if case.name == row.case), None)
    return (
        row.case,
        row.variant,
        time_text(row.median_us),
        f"{100 * row.spread:.1f} %",
        f"{row.tflops:.0f}" if row.tflops is not None else "",
        f"{row.gbps:.0f}" if row.gbps is not None else "",
        _ceiling_text(row, variant),
        *(_ratio_text(row, name) for name in REFERENCES.values()),
        floor_text(case, variant.dtype) if case and variant else "",
        f"{row.checks['relative_l2']:.1e}" if "relative_l2" in row.checks else "",
    )


def time_text(microseconds: float) -> str:
    """A time with three or four digits."""
    return f"{microseconds:.{1 if microseconds < 1000 else 0}f}"


def _ceiling_text(row: ResultRow, variant: KernelVariant | None) -> str:
    share = row.ratio_to.get(GEMM_NAMES[variant.dtype]) if variant else None
    return "" if share is None else f"{100 * share:.0f} %"


def _ratio_text(row: ResultRow, reference: str) -> str:
    ratio = row.ratio_to.get(reference)
    return "" if ratio is None else f"{ratio:.{1 if ratio >= 10 else 2}f}"


def page_table(rows: Sequence[ResultRow]) -> str:
    """The section of docs/speed.md: where the newest rows are from, and a Markdown table of the table cases."""
    shown = _table_rows(rows)
    header = ("case", "variant", "us", "TFLOP/s", "of GEMM", *_times(REFERENCES))
    header = (*header, "floor", "error", "best peer (other run)")
    return _markdown(header, "---|---|" + "---:|" * 7 + "---|---:|---:|", shown, map(_markdown_cells, shown))


def readme_table(rows: Sequence[ResultRow]) -> str:
    """The section of the README: the table cases in which a public kernel was measured; fp8 as the model runs it."""
    shown = [row for row in _table_rows(rows) if _peer_of(row) and row.variant != "fp8"]
    header = ("case", "variant", "us", "TFLOP/s", "x torch.compile", "best public kernel (other run)")
    cells = ([cells[n] for n in (0, 1, 2, 3, 6, -1)] for cells in map(_markdown_cells, shown))
    return _markdown(header, "---|---|" + "---:|" * 4, shown, cells)


def _table_rows(rows: Sequence[ResultRow]) -> list[ResultRow]:
    newest = latest(row for row in rows if row.suite == "kernels")
    ours = [row for row in newest.values() if (variant := our_variant(row)) and variant.kernel in ("auto", "smxx")]
    order = {case.name: number for number, case in enumerate(table_cases())}
    shown = [row for row in ours if row.case in order]
    if not shown:
        raise ArtefactError("there are no rows of our kernels: `make bench-kernels` measures them on a CUDA GPU")
    return sorted(shown, key=lambda row: (order[row.case], _variant_order(row)))


def _markdown(header: Sequence[str], rule: str, shown: Sequence[ResultRow], cells: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{rule}", *(f"| {' | '.join(line)} |" for line in cells)]
    return "\n".join([sources_text(shown), "", *lines])


def _variant_order(row: ResultRow) -> tuple[bool, int, str]:
    variant = parse_variant(row.variant)
    return (variant.kernel != "auto", DTYPES.index(variant.dtype), variant.name)


def _markdown_cells(row: ResultRow) -> list[str]:
    case, variant, us, _, tflops, _, ceiling, *rest = _line(row)
    *ratios, floor, error = rest
    peer = _peer_of(row)
    best = f"{peer} TFLOP/s" if peer else ""
    return [case, f"`{variant}`", us, tflops, ceiling, *ratios, floor, error, best]


def _peer_of(row: ResultRow) -> int | None:
    """TFLOP/s of the best public kernel."""
    return BEST_PEERS.get((row.case, row.variant.removesuffix(" packed")))
