"""The random-case checks themselves: a right implementation passes them, planted faults do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from attention_calls import packed_values
from attention_cases import Summary, check_case, check_cases
from attention_inputs import Case, User, random_case
from attention_stand_in import StandIn, attention, unpacked_values
from torch import Tensor

from hstu_trt.plugins.parameters import AttentionCall, AttentionOptions

CASE = Case(
    seed=3,
    users=(User(0, 70, 70, 5), User(0, 64, 64, 3)),
    options=AttentionOptions(0.125, max_attn_len=20, contextual_seq_len=2, candidate_group_size=2),
    slack=2,
)


def test_a_right_implementation_passes() -> None:
    summary = check_cases(map(random_case, range(40)), StandIn(), ("sm90",), exact_each=3)
    assert not summary.failures, summary.text()
    assert summary.runs("sm90") == 40
    assert "no failures" in summary.text()


def test_random_cases_reach_every_corner() -> None:
    cases = [random_case(seed) for seed in range(1000)]
    for name in ("dtype", "output", "layout", "cache", "norm", "attn_scale", "bias", "packed_values", "slack"):
        assert len({getattr(case, name) for case in cases}) > 1
    for name in vars(AttentionOptions()):
        assert len({getattr(case.options, name) for case in cases}) > 1
    users = [user for case in cases for user in case.users]
    assert any(not case.users for case in cases)
    assert any(user.prefix == 0 and user.candidates for user in users)
    assert any(user.prefix and not user.candidates for user in users)
    assert any(0 < user.queries < user.rows for user in users)
    assert {63, 64, 65, 127, 128, 129} <= {user.prefix for user in users}


def test_refusals_are_counted() -> None:
    class Refuses(StandIn):
        def unsupported(self, call: AttentionCall, kernel: str, output: torch.dtype) -> str | None:
            return "planted reason"

    summary = check_cases([CASE], Refuses(), ("sm90",))
    assert summary.runs("sm90") == 0
    assert "1 x planted reason" in summary.text()


def changed(**changes: object) -> Callable[[AttentionCall, Tensor], None]:
    def run(call: AttentionCall, out: Tensor) -> None:
        rows = attention(dataclasses.replace(call, options=dataclasses.replace(call.options, **changes)))
        out[:142] = rows[:142]  # all in use

    return run


def incomplete(call: AttentionCall, out: Tensor) -> None:
    out[:141] = attention(call)[:141]


def beyond_the_rows(call: AttentionCall, out: Tensor) -> None:
    out[:143] = attention(call)[:143]


def beside_the_columns(call: AttentionCall, out: Tensor) -> None:
    out[:142] = attention(call)[:142]
    out.as_strided(out.shape, out.stride(), out.storage_offset() + 16)[:, -1, -16:] = 0


def imprecise(call: AttentionCall, out: Tensor) -> None:
    out[:142] = (attention(call)[:142] * 1.01).to(out.dtype)


def unsteady(call: AttentionCall, out: Tensor) -> None:
    unsteady.calls = getattr(unsteady, "calls", 0) + 1  # type: ignore[attr-defined]
    out[:142] = attention(call)[:142] * (1 + 2**-9 * (unsteady.calls % 2))  # type: ignore[attr-defined]


def leaking(call: AttentionCall, out: Tensor) -> None:
    used = int(call.offsets.query[-1] + call.offsets.candidate[-1])
    out[:used] = attention(call)[:used] + 0 * call.v[:, 0, :1][:used, None]
    out[0] += 0 * call.v[:used].sum()


def by_company(call: AttentionCall, out: Tensor) -> None:
    used = int(call.offsets.query[-1] + call.offsets.candidate[-1])
    out[:used] = attention(call)[:used] * (1 + 2**-9 * (call.users > 1))


FAULTS = {
    "no window": (changed(max_attn_len=0), "further off"),
    "no context": (changed(contextual_seq_len=0), "further off"),
    "no groups": (changed(candidate_group_size=1), "further off"),
    "a row missing": (incomplete, "not finite"),
    "a row too much": (beyond_the_rows, "written outside"),
    "columns too much": (beside_the_columns, "written outside"),
    "a percent off": (imprecise, "further off"),
    "other bits each time": (unsteady, "other bits when it ran again"),
    "other users' values": (leaking, "NaN in user"),
    "other bits in company": (by_company, "alone has other bits"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    run_faulty, said = FAULTS[fault]

    class Faulty(StandIn):
        def run(self, call: AttentionCall, kernel: str, out: Tensor) -> None:
            if kernel == "sm90":
                run_faulty(call, out)
            else:
                super().run(call, kernel, out)

    found = check_case(CASE, Faulty(), ("sm90",), Summary(), against_exact=False)
    assert any(said in text for text in found), found


def test_packed_values_come_back() -> None:
    v = torch.arange(1, 1 + 400 * 2 * 8).remainder(120).to(torch.uint8).reshape(400, 2, 8).view(torch.float8_e4m3fn)
    prefix, candidate = torch.tensor([0, 130, 130, 300]).int(), torch.tensor([0, 1, 65, 100]).int()
    blocks = packed_values(v, prefix, candidate)
    assert blocks.shape == (2 * 6, 2, 8, 128)
    assert unpacked_values(blocks, 400, prefix, candidate).view(torch.uint8).equal(v.view(torch.uint8))
    # Slots 0 to 3 of a block hold keys 0, 1, 8 and 9; the second user's first row begins block 130 / 128 + 1.
    assert blocks[0, 0, 0, :4].view(torch.uint8).tolist() == v[[0, 1, 8, 9], 0, 0].view(torch.uint8).tolist()
    assert blocks[130 // 128 + 2, 0, 0, 0].view(torch.uint8) == v[130, 0, 0].view(torch.uint8)
