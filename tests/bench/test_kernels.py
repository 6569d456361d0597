"""The kernel benchmark as a command: dry run, no GPU, what becomes of wrong outputs; on a GPU, a small run of it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from hstu_trt.bench.kernels import runs as kernel_runs
from hstu_trt.bench.kernels import verb as kernels
from hstu_trt.bench.kernels.calls import alpha_of
from hstu_trt.bench.kernels.cases import KernelCase
from hstu_trt.bench.kernels.check import exact_rows, sample_rows
from hstu_trt.bench.kernels.inputs import Tokens
from hstu_trt.bench.kernels.runs import CaseResult, Entry, Options, gemm_rows, measure_case
from hstu_trt.bench.kernels.variants import GEMM_CASE, GEMM_NAMES, REFERENCES, KernelVariant, parse_variants
from hstu_trt.bench.result_rows import Provenance, read_rows
from hstu_trt.contract.cli import main

CASE = KernelCase(name="tiny 2x8", histories=(6, 6), candidates=2, heads=2, dim=8, references=("cudnn",))
PROVENANCE = Provenance(device="GPU", date="2026-11-22T10:00:00Z", commit="abc", versions={})


class FakeGraph:
    """Calls without a graph, each of which took 2 us (ours, by their number of sets) or 1 us."""

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def replay(self) -> None:
        for call in self.calls:
            call()

    def measure_us(self, target_ms: float) -> float:
        return 2.0 if isinstance(self.calls[0], FakeCall) else 1.0


class FakeCall:
    """Our kernel: float64 rows, wrong in the way that is asked for."""

    fault: str = ""
    runs = 0

    def __init__(self, case: KernelCase, variant: KernelVariant, tokens: Tokens) -> None:
        self.case, self.tokens = case, tokens
        self.out = torch.empty((case.query_rows, case.heads, case.dim), dtype=torch.float16)

    def unsupported(self) -> str | None:
        return "it is a full moon" if self.fault == "unsupported" else None

    def prepare(self, *, planned: bool) -> None: ...

    def __call__(self) -> torch.Tensor:
        samples = sample_rows(self.case, rows=10_000)
        every = [
            dataclasses.replace(s, prefix_positions=_all(self.case.histories[0]), candidates=_all(2)) for s in samples
        ]
        exact = exact_rows(self.case, self.tokens, every, alpha_of(self.case))
        prefix, candidates = exact.view(2, 8, 2, 8).split([6, 2], dim=1)
        exact = torch.cat([prefix.reshape(-1, 2, 8), candidates.reshape(-1, 2, 8)])
        FakeCall.runs += 1
        faults = {"wrong": exact * 1.25, "random": exact * (1 + 1e-3 * (FakeCall.runs > 1))}
        self.out[:] = faults.get(self.fault, exact)
        if self.fault == "unwritten":
            self.out[3] = float("nan")
        return self.out


def _all(count: int):
    return torch.arange(count).numpy()


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch):
    """``fakes(fault)`` measures CASE with stand-ins for the kernel and for the GPU."""

    def measure(fault: str, variants: tuple[str, ...] = ("fp16",)) -> CaseResult:
        monkeypatch.setattr(FakeCall, "fault", fault)
        monkeypatch.setattr(FakeCall, "runs", 0)
        monkeypatch.setattr(kernel_runs, "kernel_call", FakeCall)
        monkeypatch.setattr(kernel_runs, "GraphedCalls", FakeGraph)
        monkeypatch.setattr(kernel_runs, "l2_cache_bytes", lambda device: 1)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        options = Options(parse_variants(variants), ("eager",), 3, 1.0, 0.001, torch.device("cpu"))
        gemm = Entry(graph=FakeGraph([lambda: None]), flops=2 * CASE.flops)
        return measure_case(CASE, options, {"fp16": gemm, "fp8": gemm}, PROVENANCE)

    return measure


def test_a_right_output_becomes_a_row(fakes) -> None:
    result = fakes("")
    assert not result.failures and not result.skipped
    (row,) = result.rows
    assert (row.case, row.variant, row.median_us, row.spread) == ("tiny 2x8", "fp16", 2.0, 0.0)
    assert row.tflops == CASE.flops / 2.0 / 1e6 and row.gbps == CASE.bytes_moved("fp16") / 2.0 / 1e3
    assert row.per_s == 1e6
    assert row.ratio_to == {GEMM_NAMES["fp16"]: 0.25}
    assert row.checks["non_finite"] == 0 and 0 < row.checks["relative_l2"] < 3e-4
    assert result.gemm_rounds_us == {GEMM_NAMES["fp16"]: [1.0, 1.0, 1.0]}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("wrong", "relative_l2 against float64 is 0.25"),
        ("unwritten", "16 elements of the output are not finite, or were not written"),
        ("random", "the output changed between two runs"),
    ],
)
def test_a_wrong_output_has_no_row(fakes, fault: str, said: str) -> None:
    result = fakes(fault)
    assert not result.rows
    assert result.failures[0].startswith("tiny 2x8, fp16: ") and said in result.failures[0]


def test_what_is_not_supported_is_said(fakes) -> None:
    result = fakes("unsupported")
    assert not result.rows and not result.failures
    assert result.skipped == ["tiny 2x8, fp16: it is a full moon"]


def test_gemm_rows_join_the_rounds() -> None:
    name = GEMM_NAMES["fp8"]
    (row,) = gemm_rows([{name: [1000.0, 1100.0]}, {name: [900.0]}, {}], PROVENANCE, "kernels")
    assert (row.case, row.variant, row.median_us, row.spread) == (GEMM_CASE, name, 1000.0, 0.2)
    assert row.tflops == pytest.approx(2 * 8192**3 / 1e9)


def run_with(monkeypatch: pytest.MonkeyPatch, result: CaseResult, out: Path, *options: str) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(kernels, "_measure", lambda *_: result)
    arguments = ["--cases", "B4 4x128", "--references", "none", "--commit", "abc", "--out", str(out)]
    return main(["bench", "kernels", *arguments, *options])


def test_the_exit_code_is_that_of_the_checks(fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    good, bad = fakes(""), fakes("wrong")
    assert run_with(monkeypatch, good, tmp_path / "rows.jsonl") == 0
    assert "2 rows to" in capsys.readouterr().out
    assert run_with(monkeypatch, bad, tmp_path / "rows.jsonl") == 1
    assert "FAILED: tiny 2x8, fp16: relative_l2" in capsys.readouterr().out
    assert [row.variant for row in read_rows([tmp_path / "rows.jsonl"])] == ["fp16", GEMM_NAMES["fp16"]]
    assert run_with(monkeypatch, CaseResult(), tmp_path / "rows.jsonl") == 1


def test_json_stands_alone_on_stdout(fakes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    assert run_with(monkeypatch, fakes(""), tmp_path / "rows.jsonl", "--json") == 0
    shown = capsys.readouterr()
    assert [row["variant"] for row in json.loads(shown.out)] == ["fp16", "torch.mm fp16"]
    assert "2 rows to" in shown.err


def test_dry_run_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--dry-run", "--cases", "B4 8x64,SH B128 4x128"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("B4 8x64 ") and "349.6, 349.6, 53.0" in lines[1] and "1292025856" in lines[1]
    assert lines[2].startswith("SH B128 4x128 ") and "3.1, 1.6, 23.5" in lines[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--cases", "B5"], "unknown case 'B5'"),
        (["--variants", "fp17"], "unknown variant 'fp17'"),
        (["--references", "magma"], "unknown reference 'magma'"),
        (["--rounds", "0"], "--rounds: must be >= 1, got 0"),
    ],
)
def test_wrong_options_are_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_no_gpu_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels"]) == 2
    assert "PyTorch sees no CUDA GPU here" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--cases", "SH B128 4x128", "--variants", "fp16,fp16 planned", "--references", "eager,gemm", "--quick"]
    assert main(["bench", "kernels", *options, "--commit", "abc", "--out", str(out)]) == 0, capsys.readouterr().out
    rows = {row.variant: row for row in read_rows([out])}
    assert {"fp16", "fp16 planned", REFERENCES["eager"], GEMM_NAMES["fp16"]} <= set(rows)
    assert rows["fp16"].ratio_to[REFERENCES["eager"]] > 1
    assert rows["fp16"].checks["non_finite"] == 0
