"""``hstu-trt bench model``: is the ``cuda`` runner right, and how many requests does one GPU score in process?

Scores are checked first, against the PyTorch model in fp32 on the same weights and rows. Then come offline throughput
(requests wait in a queue and are packed by tokens), one request alone, and the PyTorch model for comparison.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hstu_trt.bench import result_rows
from hstu_trt.bench.arguments import count, counts, positive, some_of, suite_parser
from hstu_trt.bench.model.work import request_flops
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.text import names_in

if TYPE_CHECKING:
    from hstu_trt.bench.model.cases import ModelCase
    from hstu_trt.engines.cuda.runner import CudaModel, FusedRunner

SUITE = "model"
GATE_EXIT_CODE = 1
LOGIT_GATES = {"fp16": 0.012, "fp8": 0.15}
"""Largest rms error of the logits against fp32: fp16 what a per-request NE of 0.1 % bears at 2,048 candidates."""
_REFERENCES = ("dense", "compiled", "ours")
"""As ``references.REFERENCES`` has them, which needs PyTorch."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run measures."""

    cases: tuple[str, ...]
    precisions: tuple[str, ...]
    tokens: tuple[int, ...]
    """Micro-batches, in tokens."""
    requests: int
    seconds: float
    references: tuple[str, ...]
    profile: bool


def main(argv: Sequence[str]) -> int:
    """The whole model in process on a CUDA GPU: checked, then timed; exit code 1 if a score is wrong."""
    parser = suite_parser("model", main.__doc__)
    parser.add_argument("--cases", default="dlrm_v3 stream", help="names with commas between (%(default)s)")
    parser.add_argument(
        "--precisions", type=some_of(LOGIT_GATES, "precisions"), default=tuple(LOGIT_GATES), help="(default: fp16,fp8)"
    )
    parser.add_argument(
        "--tokens", type=counts, default=(36864,), help="of a micro-batch, several with commas (default: 36864)"
    )
    parser.add_argument("--requests", type=count, default=128, help="different requests (%(default)s)")
    parser.add_argument("--seconds", type=positive, default=3.0, help="of each offline measurement (%(default)s)")
    references = some_of((*_REFERENCES, "none"), "references")
    text = f"{','.join(_REFERENCES)} (default: all), or none"
    parser.add_argument("--references", type=references, default=_REFERENCES, help=text)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, kernel by kernel")
    parser.add_argument("--out", type=Path, help="file for the rows (default: bench/results/model_<gpu>.jsonl)")
    parser.add_argument("--commit", help="of the rows, where this tree is no git checkout")
    args = parser.parse_args(argv)
    plan = Plan(
        cases=names_in(args.cases), precisions=args.precisions, tokens=args.tokens,
        requests=args.requests, seconds=args.seconds, profile=args.profile,
        references=() if "none" in args.references else args.references,
    )  # fmt: skip
    return run(plan, args.out, args.commit)


def run(plan: Plan, out: Path | None, commit: str | None) -> int:
    """Measures case after case and appends the rows; the exit code."""
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("PyTorch sees no CUDA GPU here, and the model is timed on one")
    from hstu_trt.bench.model.cases import select_cases

    device = torch.cuda.get_device_name()
    path = out or result_rows.RESULTS / f"model_{result_rows.device_slug(device)}.jsonl"
    provenance = result_rows.Provenance.here(device, result_rows.cuda_versions(), commit)
    failures = 0
    for case in select_cases(list(plan.cases)):
        measured = _Case(case, plan, provenance)
        measured.run()
        result_rows.append_rows(path, measured.rows)
        for row in measured.rows:
            print(_line(row), flush=True)
        failures += len(measured.failures)
        print("\n".join(f"FAILED: {failure}" for failure in measured.failures), flush=True)
        del measured
        torch.cuda.empty_cache()
    return GATE_EXIT_CODE if failures else 0


def _line(row: result_rows.ResultRow) -> str:
    rate = "" if row.per_s is None else f"{row.per_s:9.1f} requests/s"
    work = "" if row.tflops is None else f"{row.tflops:7.0f} TFLOP/s"
    ratios = " ".join(f"{name}: {ratio:.2f}x" for name, ratio in row.ratio_to.items())
    checks = " ".join(f"{name}={value:.4g}" for name, value in row.checks.items())
    return f"{row.case:<20} {row.variant:<34} {row.median_us:9.1f} us {rate} {work} {ratios} {checks}"


class _Case:
    """One model under one law of lengths."""

    def __init__(self, case: ModelCase, plan: Plan, provenance: result_rows.Provenance) -> None:
        import torch

        from hstu_trt.bench.model import cases as model_cases

        self.case, self.plan, self.provenance = case, plan, provenance
        self.rows: list[result_rows.ResultRow] = []
        self.failures: list[str] = []
        self._feeds = model_cases.requests(case, plan.requests)
        self._tables = model_cases.device_tables(case.config, torch.device("cuda"))
        precisions: Any = list(dict.fromkeys(("fp32", "fp16", *plan.precisions)))
        self._weights = model_cases.random_weights(case.config, precisions)
        lengths = [len(feed["uih_timestamps"]) for feed in self._feeds]
        counts = [len(feed["candidate_timestamps"]) for feed in self._feeds]
        self._flops = statistics.fmean(request_flops(case.config, n, c) for n, c in zip(lengths, counts, strict=True))
        self._tokens = statistics.fmean(lengths) + statistics.fmean(counts)
        history = f"history {np.mean(lengths):.0f} (median {np.median(lengths):.0f})"
        print(f"{case.name}: {len(lengths)} requests, {history}, {self._flops / 1e9:.1f} GFLOP each", flush=True)

    def run(self) -> None:
        """References first, so that ours can name its ratios to them."""
        expected = self._oracle()
        reference_us = {name: self._reference(name) for name in self.plan.references}
        known = {name: us for name, us in reference_us.items() if us is not None}
        for precision in self.plan.precisions:
            model = self._model(precision)
            alone = self._runner(model, 1).run_many(self._feeds[: len(expected)])
            checks = self._check(alone, expected, precision)
            for tokens in self.plan.tokens:
                self._offline(model, precision, tokens, expected, known)
            self._single(model, precision, checks, known)

    def _oracle(self) -> list[Any]:
        """Scores fp32 of the first requests, from the PyTorch model in fp32 with plain operators."""
        import torch

        from hstu_trt.bench.model.references import TorchModel

        torch.backends.cuda.matmul.allow_tf32 = False
        oracle = TorchModel(self.case.config, self._weights["fp32"], "fp32", self._tables, "dense")
        expected = [oracle.scores(feed).cpu().numpy() for feed in self._feeds[:4]]
        del oracle
        torch.cuda.empty_cache()
        return expected

    def _model(self, precision: Any) -> CudaModel:
        from hstu_trt.engines.cuda.runner import CudaModel, CudaOptions

        weights = self._weights[precision]
        return CudaModel(self.case.config, weights.dense, precision, self._tables, CudaOptions())

    def _runner(self, model: CudaModel, tokens: int) -> FusedRunner:
        from hstu_trt.engines.cuda.runner import FusedRunner

        model.options = replace(model.options, max_tokens=tokens)
        return FusedRunner(model, self.case.limits)

    def _check(self, answers: Sequence[Tensors], expected: list[Any], precision: str) -> dict[str, float]:
        """Errors of the first answers' logits against the oracle."""
        differences = [_logits(a["preds"]) - _logits(e) for a, e in zip(answers, expected, strict=False)]
        rms = float(np.sqrt(np.mean(np.square(np.concatenate(differences)))))
        sd = float(np.std(np.concatenate([_logits(e) for e in expected])))
        checks = {"logit_rms_error": rms, "logit_max_error": float(np.abs(np.concatenate(differences)).max()),
                  "logit_sd": sd}  # fmt: skip
        if not rms <= LOGIT_GATES[precision] * max(sd, 0.1):
            self.failures.append(f"{self.case.name}, {precision}: logits are {rms:.4g} off (rms), of sd {sd:.3g}")
        return checks

    def _offline(
        self, model: CudaModel, precision: str, tokens: int, expected: list[Any], references: Mapping[str, float]
    ) -> None:
        import torch

        runner = self._runner(model, tokens)
        # Captures the graphs, and checks users that are packed as they will be when timed.
        checks = self._check(runner.run_many(self._feeds), expected, precision)
        shares = self._profile(runner, tokens, precision) if self.plan.profile else {}
        rounds: list[float] = []
        began = time.perf_counter()
        while time.perf_counter() - began < self.plan.seconds or len(rounds) < 3:
            start = time.perf_counter()
            runner.run_many(self._feeds)
            rounds.append((time.perf_counter() - start) * 1e6 / len(self._feeds))
        assert runner.pipeline is not None
        facts = {"graphs": float(len(runner.pipeline.graphs)), "memory_gib": torch.cuda.max_memory_reserved() / 2**30}
        self._add(f"cuda {precision} offline {tokens}", rounds, checks | facts | shares, references)
        del runner

    def _profile(self, runner: FusedRunner, tokens: int, precision: str) -> dict[str, float]:
        """Prints the kernels; how much longer all take than the products and the attention."""
        from hstu_trt.bench.model.profile import profile

        few = self._feeds[: max(1, round(4 * tokens / self._tokens))]
        found = profile(lambda: runner.run_many(few))
        # Copies run beside the computation.
        total = sum(kernel.us for kernel in found.kernels if kernel.kind != "copies")
        print(found.text(f"{self.case.name} {precision} {tokens}, {len(few)} requests"))
        ratio = total / found.floor_us
        print(f"  products and attention {found.floor_us:.0f} us; all kernels {ratio:.3f}x", flush=True)
        return {"kernels_over_products_and_attention": ratio}

    def _single(
        self, model: CudaModel, precision: str, checks: dict[str, float], references: Mapping[str, float]
    ) -> None:
        for whole in (True, False):
            model.network.whole_items = whole
            runner = self._runner(model, 1)
            for feed in self._feeds:  # captures the graphs
                runner.run(feed)
            times = []
            for _ in range(3):
                for feed in self._feeds:
                    start = time.perf_counter()
                    runner.run(feed)
                    times.append((time.perf_counter() - start) * 1e6)
            p50, p99 = np.percentile(times, [50, 99])
            variant = f"cuda {precision} single{'' if whole else ' split'}"
            self._add(variant, times, checks | {"p50_us": float(p50), "p99_us": float(p99)}, references)
        model.network.whole_items = True

    def _reference(self, attention: str) -> float | None:
        """Median microseconds of a request by the PyTorch model, and its row; None where it cannot run."""
        import torch

        from hstu_trt.bench.chain import use_kernels
        from hstu_trt.bench.model.references import REFERENCES, TorchModel

        use_kernels()
        feeds = self._feeds[:1] if attention == "compiled" else self._feeds[:8]
        try:
            model = TorchModel(self.case.config, self._weights["fp16"], "fp16", self._tables, attention)
            times = _repeated(lambda feed: model.scores(feed).cpu(), feeds, self.plan.seconds / 2)
        except RuntimeError as error:
            print(f"skipped: {REFERENCES[attention]}: {str(error).strip().partition(chr(10))[0]}", flush=True)
            return None
        finally:
            torch.cuda.empty_cache()
        self._add(REFERENCES[attention], times, {}, {})
        return statistics.median(times)

    def _add(
        self, variant: str, us: Sequence[float], checks: Mapping[str, float], references: Mapping[str, float]
    ) -> None:
        from hstu_trt.bench.model.references import REFERENCES

        median = statistics.median(us)
        facts = {"tokens_per_s": self._tokens / median * 1e6}
        self.rows.append(
            result_rows.ResultRow(
                **vars(self.provenance), suite=SUITE, case=self.case.name, variant=variant, median_us=median,
                spread=(max(us) - min(us)) / median, tflops=self._flops / median / 1e6, per_s=1e6 / median,
                ratio_to={REFERENCES[name]: reference / median for name, reference in references.items()},
                checks={**checks, **facts},
            )
        )  # fmt: skip


def _repeated(call: Callable[[Tensors], object], feeds: Sequence[Tensors], seconds: float) -> list[float]:
    """Microseconds of each call after a first pass, for some seconds."""
    for feed in feeds:
        call(feed)
    times = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for feed in feeds:
            start = time.perf_counter()
            call(feed)
            times.append((time.perf_counter() - start) * 1e6)
    return times


def _logits(preds: Any) -> Any:
    """Of probabilities [candidates, 1]."""
    p = np.clip(preds.astype(np.float64), 1e-12, 1 - 1e-12)
    return np.log(p / (1 - p))
