"""From ids to rows: the vectors that every language must reproduce, policies, statuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from id_rules import IDS, RULES, VECTORS

from hstu_trt.contract.stored_table import IdRule
from hstu_trt.tables.ids import POLICIES, ZERO_ROW, RowStatus, fastrange, resolve_ids, splitmix64


def oracle(id_, rule, rows, row_of_id, policy, padding_id):
    """One id in Python's integers: (row, status), or None for a rejected one."""

    def hashed(value):
        if rule.hash == "splitmix64":
            return (int(splitmix64(np.asarray([value]), rule.seed)[0]) * rows) >> 64 if rows else None
        if not 0 <= value < (rows if row_of_id is None else len(row_of_id)):
            return None
        row = value if row_of_id is None else int(row_of_id[value])
        return row if row < rows else None

    if id_ == padding_id:
        return ZERO_ROW, RowStatus.PADDING
    row = hashed(id_)
    if row is not None:
        return row, RowStatus.HOST
    if policy == "reject" or (not rows and policy in ("clamp", "row0")):
        return None
    near = hashed(min(max(id_, 0), (rows if row_of_id is None else len(row_of_id)) - 1)) if rows else None
    stand_in = {
        "zero": ZERO_ROW,
        "clamp": rows - 1 if near is None else near,
        "row0": 0,
        "default_row": ZERO_ROW if rule.default_row is None else rule.default_row,
    }
    return stand_in[policy], RowStatus.BAD_ID


def test_the_first_hashes_are_the_published_ones():
    """The first outputs of the reference implementation of splitmix64 from the state 0."""
    gamma = 0x9E3779B97F4A7C15
    states = np.asarray([0, gamma, 2 * gamma % 2**64, 3 * gamma % 2**64], np.uint64).view(np.int64)
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert splitmix64(states, 0).tolist() == published


@pytest.mark.parametrize(("id_", "seed", "rows", "hashed", "row"), VECTORS)
def test_vectors(id_, seed, rows, hashed, row):
    found = splitmix64(np.asarray([id_]), seed)
    assert f"{found[0]:016x}" == hashed
    assert fastrange(found, rows).tolist() == [row]


@given(h=st.integers(0, 2**64 - 1), rows=st.integers(1, 2**63 - 1))
def test_fastrange_is_the_high_half_of_the_product(h, rows):
    assert fastrange(np.asarray([h], np.uint64), rows).tolist() == [(h * rows) >> 64]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padding_id", [None, -1, 0, 99])
@pytest.mark.parametrize("rows", [7, 0, 4])
def test_every_policy_and_hash(rule, policy, padding_id, rows):
    ids, (rule, row_of_id) = np.asarray(IDS), RULES[rule]
    if not rows:
        row_of_id = None if row_of_id is None else row_of_id[:0]
        rule = IdRule(hash=rule.hash, seed=rule.seed, row_of_id=rule.row_of_id)
    found = resolve_ids(ids, rule, rows, row_of_id, policy, padding_id)
    expected = [oracle(id_, rule, rows, row_of_id, policy, padding_id) for id_ in IDS]
    refused = [place for place, one in enumerate(expected) if one is None]
    assert found.rejected == (refused[0] if refused else None)
    bad = [oracle(id_, rule, rows, row_of_id, "zero", padding_id)[1] == RowStatus.BAD_ID for id_ in IDS]
    assert found.bad == sum(bad)
    if not refused:
        assert found.rows.tolist() == [row for row, _ in expected]
        assert found.status.tolist() == [status for _, status in expected]


def test_hashed_ids_spread_over_the_rows():
    rows = fastrange(splitmix64(np.arange(100_000), 3), 10)
    assert np.bincount(rows, minlength=10).min() > 9_500
