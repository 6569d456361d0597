"""The accuracy checks themselves: two roundings pass them on any inputs, anything more does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import pytest
import torch
from attention_accuracy import INPUTS, OVER_GATE, Accuracy, Deviation, accuracy_cases, describe, measure, table
from attention_calls import rounded
from attention_inputs import DTYPES, Case, make_tokens
from attention_stand_in import StandIn
from torch import Tensor

from hstu_trt.contract.gates import ATTENTION_GATES
from hstu_trt.plugins.parameters import AttentionCall

CASES = list(accuracy_cases((100,), (64,)))
SHORT = {(case.dtype, kind): case for case, kind in zip(CASES, [*INPUTS] * 3, strict=True)}
Change = Callable[[Tensor], Tensor]


class Rounding(StandIn):
    """Rounds SiLU of scores as kernels do; with changes to it and to the sums."""

    def __init__(self, dtype: str, weights: Change = lambda x: x, sums: Change = lambda x: x) -> None:
        self._dtype, self._weights, self._sums = DTYPES[dtype], weights, sums

    def run(self, call: AttentionCall, kernel: str, out: Tensor) -> None:
        exact_silu = torch.nn.functional.silu
        exact_out = torch.empty_like(out, dtype=torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.nn.functional, "silu", lambda x: rounded(self._weights(exact_silu(x)), self._dtype)
            )  # fmt: skip
            super().run(call, kernel, exact_out)
        out.copy_(self._sums(exact_out))


def one(case: Case, backend: StandIn) -> Accuracy:
    (result,) = measure(case, ("sm90",), backend)
    return result


def seeded(case: Case, seeds: Iterable[int]) -> list[Case]:
    return [dataclasses.replace(case, seed=seed) for seed in seeds]


def test_every_case_has_its_kinds_of_inputs() -> None:
    assert [describe(case) for case in SHORT.values() if case.dtype == "fp8"] == [
        f"fp8, {kind}, dim 64, 100 + 128 tokens" for kind in INPUTS
    ]
    plain, tokens, dims = (make_tokens(SHORT["fp16", kind], "cpu") for kind in INPUTS)
    assert tokens.q[0].abs().amax(dim=(1, 2)).max() > 20
    larger = [dims.k[0].abs().mean(dim=(0, 1)), plain.k[0].abs().mean(dim=(0, 1))]
    assert (larger[0] / larger[1]).round().tolist() == [8.0] + [1.0] * 63
    assert dims.v[0].equal(plain.v[0])


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8"])
def test_two_roundings_pass(dtype: str, kind: str) -> None:
    for case in seeded(SHORT[dtype, kind], range(8)):
        result = one(case, Rounding(dtype))
        assert result.faults == []
        for deviation in filter(None, (result.given, result.from_fp16)):
            assert deviation.error == pytest.approx(deviation.ideal, rel=0.005)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp8"])
def test_outliers_make_two_roundings_cost_more_than_the_gate(dtype: str) -> None:
    """The reason why the gate alone does not hold there: it is over for some seeds, far below for others."""
    results = [one(case, Rounding(dtype)) for case in seeded(SHORT[dtype, "outlier tokens"], range(40))]
    gate = ATTENTION_GATES.relative_l2[dtype]
    ideals = [result.given.ideal for result in results]
    assert min(ideals) < 0.98 * gate < gate < max(ideals) < OVER_GATE * gate
    assert not any(result.faults for result in results)


def third_rounding(out: Tensor) -> Tensor:
    return 3 * (out / 3).half().float()


FAULTS: dict[str, tuple[str, dict[str, Change]]] = {
    "a third rounding": ("fp16", {"sums": third_rounding}),
    "weights of bf16": ("fp16", {"weights": lambda x: x.bfloat16().float()}),
    "weights a thousandth off": ("fp16", {"weights": lambda x: 1.001 * x}),
    "sums of bf16, twice": ("bf16", {"sums": lambda x: 3 * (x / 3).bfloat16().float()}),
    "weights of e5m2": ("fp8", {"weights": lambda x: x.to(torch.float8_e5m2).float()}),
    "weights 3 percent off": ("fp8", {"weights": lambda x: 0.97 * x}),
    "NaN": ("fp16", {"sums": lambda x: x * float("nan")}),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_anything_more_is_noticed(fault: str, kind: str) -> None:
    dtype, changes = FAULTS[fault]
    results = [one(case, Rounding(dtype, **changes)) for case in seeded(SHORT[dtype, kind], range(3))]
    assert any(result.faults for result in results), table(results)


def test_limits() -> None:
    gate, ideal = 3.0e-4, 3.1e-4
    assert Deviation(0.0, ideal, gate, strict=True).limit == gate
    assert Deviation(0.0, ideal, gate, strict=False).limit == pytest.approx(1.02 * ideal)
    assert Deviation(0.0, 2.0e-4, gate, strict=False).limit == gate
    assert Deviation(0.0, 1.0, gate, strict=False).limit == OVER_GATE * gate
    assert Deviation(0.0, float("nan"), gate, strict=False).limit == gate


def test_the_table_shows_the_worst_of_each_kind() -> None:
    results = [one(case, Rounding(case.dtype)) for case in CASES]
    lines = table([*results, dataclasses.replace(results[0], given=Deviation(9.0, 1.0, 2.0, strict=True))]).splitlines()
    assert len(lines) == 1 + 9
    assert "L2 from fp16" in lines[0]
    assert " 9 " in lines[1]
    assert all(describe(case) in line for case, line in zip(CASES, lines[1:], strict=True))


def test_e4m3_saturates() -> None:
    x = torch.tensor([1000.0, -1e9, 449.0, 17.0, 2.0**-10, 0.0], dtype=torch.float64)
    assert rounded(x, torch.float8_e4m3fn).tolist() == [448.0, -448.0, 448.0, 16.0, 0.0, 0.0]
