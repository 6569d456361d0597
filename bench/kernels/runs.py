"""One case of the kernel benchmark: check every variant, then time all of them and their references in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hstu_trt.bench.kernels.calls import KernelCall, alpha_of, kernel_call
from hstu_trt.bench.kernels.cases import Dtype, KernelCase
from hstu_trt.bench.kernels.check import UserSample, exact_rows, non_finite, query_rows, relative_l2, sample_rows
from hstu_trt.bench.kernels.inputs import Tokens, random_tokens
from hstu_trt.bench.kernels.references import build_reference, gemm_reference
from hstu_trt.bench.kernels.variants import GEMM_CASE, GEMM_NAMES, GEMM_SIZE, KernelVariant
from hstu_trt.bench.result_rows import Provenance, ResultRow
from hstu_trt.bench.timing import Contender, GraphedCalls, Timing, input_sets, time_in_turn
from hstu_trt.contract.gates import ATTENTION_GATES
from hstu_trt.plugins.library import KernelError

SUITE = "kernels"
SUSTAINED_SUITE = "kernels sustained"
"""Rows measured without pauses, on a GPU that its power limit slows."""
_SEED = 20261122


@dataclass(frozen=True)
class Options:
    """What is measured, and how long."""

    variants: Sequence[KernelVariant]
    references: Sequence[str]
    rounds: int
    target_ms: float
    """Time of one contender in one round."""
    pause_ms: float
    """Idle time before it."""
    device: torch.device

    @property
    def suite(self) -> str:
        """Of the rows."""
        return SUITE if self.pause_ms > 0 else SUSTAINED_SUITE


@dataclass
class CaseResult:
    """What came of a case."""

    rows: list[ResultRow] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Sentences on variants whose output is wrong; they have no row."""
    skipped: list[str] = field(default_factory=list)
    """Sentences on what cannot run here."""
    gemm_rounds_us: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A contender with what its row needs."""

    graph: Contender
    flops: int
    bytes_moved: int | None = None
    checks: dict[str, float] = field(default_factory=dict)
    unchanged: Callable[[], bool] = lambda: True
    """Whether the timed calls gave the output that was checked."""


class CaseInputs:
    """Input sets of a case by dtype, and the exact outputs of the first of them, made when they are asked for."""

    def __init__(self, case: KernelCase, device: torch.device) -> None:
        self.case, self.device = case, device
        self.samples: list[UserSample] = sample_rows(case)
        self.rows = query_rows(case, self.samples).to(device)
        self._sets: dict[Dtype, list[Tokens]] = {}
        self._exact: dict[Dtype, Tensor] = {}

    def sets(self, dtype: Dtype) -> list[Tokens]:
        """As many sets as exceed the L2 cache."""
        if dtype not in self._sets:
            count = input_sets(self.case.bytes_read(dtype), l2_cache_bytes(self.device))
            self._sets[dtype] = [random_tokens(self.case, _SEED + n, self.device, dtype) for n in range(count)]
        return self._sets[dtype]

    def errors(self, output: Tensor, dtype: Dtype) -> dict[str, float]:
        """Relative L2 errors of an output for the first set of a dtype."""
        rows = output[self.rows]
        found = {"relative_l2": relative_l2(rows, self._exact_rows(dtype))}
        if dtype == "fp8":
            found["relative_l2_from_fp16"] = relative_l2(rows, self._exact_rows("fp16"))
        return found

    def _exact_rows(self, dtype: Dtype) -> Tensor:
        if dtype not in self._exact:
            self._exact[dtype] = exact_rows(self.case, self.sets(dtype)[0], self.samples, alpha_of(self.case))
        return self._exact[dtype]


def current_device() -> torch.device:
    """The GPU that PyTorch works on."""
    return torch.device("cuda", torch.cuda.current_device())


def l2_cache_bytes(device: torch.device) -> int:
    """Size of a GPU's L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size


def measure_case(
    case: KernelCase, options: Options, gemms: Mapping[Dtype, Entry], provenance: Provenance
) -> CaseResult:
    """Checks and times a case. gemms: by dtype, timed along as the ceiling."""
    inputs, result = CaseInputs(case, options.device), CaseResult()
    entries: dict[str, Entry] = {}
    variants = {variant.name: variant for variant in options.variants}
    for name, variant in variants.items():
        entry = _checked_variant(inputs, variant, result)
        if entry is not None:
            entries[name] = entry
    if entries:
        entries |= _reference_entries(inputs, options.references, result)
        dtypes = {variants[name].dtype for name in entries if name in variants}
        entries |= {GEMM_NAMES[dtype]: entry for dtype, entry in gemms.items() if dtype in dtypes}
    rounds_us = time_in_turn(
        {name: entry.graph for name, entry in entries.items()},
        rounds=options.rounds,
        target_ms=options.target_ms,
        pause_ms=options.pause_ms,
    )
    result.gemm_rounds_us = {name: us for name, us in rounds_us.items() if name in GEMM_NAMES.values()}
    _add_rows(case, entries, rounds_us, provenance, options.suite, result)
    return result


def _checked_variant(inputs: CaseInputs, variant: KernelVariant, result: CaseResult) -> Entry | None:
    """Runs a variant once on a poisoned output; None, and a sentence in the result, if that cannot or went wrong."""
    case = inputs.case
    calls = [kernel_call(case, variant, tokens) for tokens in inputs.sets(variant.dtype)]
    if sentence := calls[0].unsupported():
        result.skipped.append(f"{case.name}, {variant.name}: {sentence}")
        return None
    try:
        output = _poisoned_run(calls[0], calls[0])
    except KernelError as error:
        result.failures.append(f"{case.name}, {variant.name}: {error}")
        return None
    checks = {**inputs.errors(output, variant.dtype), "non_finite": float(non_finite(output))}
    if sentence := check_failure(checks, variant.dtype):
        result.failures.append(f"{case.name}, {variant.name}: {sentence}")
        return None
    # Plans belong to the stream that they are made on: here the graph's, as it warms up.
    for call in calls:
        call.prepare(planned=variant.planned)
    graph = GraphedCalls(calls)

    def unchanged() -> bool:
        return torch.equal(_poisoned_run(calls[0], graph.replay).view(torch.int16), output.view(torch.int16))

    moved = case.bytes_moved(variant.dtype)
    return Entry(graph=graph, flops=case.flops, bytes_moved=moved, checks=checks, unchanged=unchanged)


def _poisoned_run(call: KernelCall, run: Callable[[], object]) -> Tensor:
    """What ``run`` writes into the call's output after it was filled with NaN."""
    call.out.fill_(float("nan"))
    run()
    torch.cuda.synchronize()
    return call.out.clone()


def check_failure(checks: Mapping[str, float], dtype: Dtype) -> str | None:
    """Why a variant's output is wrong, or None. NaN never passes."""
    if checks["non_finite"]:
        return f"{checks['non_finite']:.0f} elements of the output are not finite, or were not written"
    gates = {"relative_l2": ATTENTION_GATES.relative_l2[dtype]}
    if dtype == "fp8":
        gates["relative_l2_from_fp16"] = ATTENTION_GATES.relative_l2_from_fp16
    for name, gate in gates.items():
        if not checks[name] <= gate:
            return f"{name} against float64 is {checks[name]:.3g}, allowed are {gate:.3g}"
    return None


def _reference_entries(inputs: CaseInputs, names: Sequence[str], result: CaseResult) -> dict[str, Entry]:
    """The references of a case that this machine can run."""
    entries = {}
    for name in (name for name in inputs.case.references if name in names):
        try:
            reference = build_reference(name, inputs.case, inputs.sets("fp16")[:2], alpha_of(inputs.case))
            if isinstance(reference, str):
                result.skipped.append(f"{inputs.case.name}, {reference}")
                continue
            output = reference.calls[0]()
            checks = inputs.errors(reference.rows(output), "fp16") if reference.rows else {}
            del output
            graph = GraphedCalls(reference.calls)
            entries[reference.name] = Entry(graph=graph, flops=reference.flops, checks=checks)
        except RuntimeError as error:  # out of memory, or a shape that the backend refuses
            first_line = str(error).strip().partition("\n")[0]
            result.skipped.append(f"{inputs.case.name}, {name}: {type(error).__name__}: {first_line}")
            torch.cuda.empty_cache()
    return entries


def gemm_entries(dtypes: Iterable[Dtype], device: torch.device) -> dict[Dtype, Entry]:
    """A large GEMM per dtype, the ceiling that is timed along with every case."""
    entries = {}
    for dtype in dtypes:
        gemm = gemm_reference(dtype, device)
        entries[dtype] = Entry(graph=GraphedCalls(gemm.calls), flops=gemm.flops)
    return entries


def _add_rows(
    case: KernelCase,
    entries: Mapping[str, Entry],
    rounds_us: Mapping[str, Sequence[float]],
    provenance: Provenance,
    suite: str,
    result: CaseResult,
) -> None:
    """Rows of the case's contenders but for the GEMMs, ours with the ratios to all others."""
    timings = {name: Timing.of(us) for name, us in rounds_us.items()}
    tflops = {name: entries[name].flops / timing.median_us / 1e6 for name, timing in timings.items()}
    ours = [name for name, entry in entries.items() if entry.bytes_moved is not None]
    for name in (name for name in entries if name not in GEMM_NAMES.values()):
        entry, us = entries[name], timings[name].median_us
        if not entry.unchanged():
            result.failures.append(f"{case.name}, {name}: the output changed between two runs on the same inputs")
            continue
        row = ResultRow(
            **vars(provenance),
            suite=suite,
            case=case.name,
            variant=name,
            median_us=us,
            spread=timings[name].spread,
            tflops=tflops[name],
            per_s=case.users / us * 1e6,
            checks=entry.checks,
        )
        if entry.bytes_moved is not None:
            ratios = {other: tflops[name] / tflops[other] for other in entries if other not in ours}
            row = replace(row, gbps=entry.bytes_moved / us / 1e3, ratio_to=ratios)
        result.rows.append(row)


def gemm_rows(
    rounds_us: Sequence[Mapping[str, Sequence[float]]], provenance: Provenance, suite: str
) -> list[ResultRow]:
    """A row per GEMM over the rounds of all cases."""
    rows = []
    for name in GEMM_NAMES.values():
        if all_us := [us for rounds in rounds_us for us in rounds.get(name, ())]:
            timing = Timing.of(all_us)
            tflops = 2 * GEMM_SIZE**3 / timing.median_us / 1e6
            row = ResultRow(
                **vars(provenance), suite=suite, case=GEMM_CASE, variant=name, tflops=tflops, **vars(timing)
            )
            rows.append(row)
    return rows
