"""An overlay answers as the whole version does that it leads to."""

import numpy as np
import pytest
from table_versions import (
    OPENERS,
    POLICIES,
    ROWS,
    RULES,
    answer,
    longer,
    opener,
    replaced,
    rows_of,
    some_ids,
    write_delta,
    write_version,
)

from hstu_trt.contract.errors import InputError
from hstu_trt.tables.delta import tables_digest
from hstu_trt.tables.host import HostTables


@pytest.mark.parametrize("how", OPENERS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "float8_e4m3fn"])
def test_overlay_answers_as_the_whole_version(tmp_path, how, rule, dtype):
    first = rows_of(1, ROWS, dtype)
    second = replaced(first, 2, 0.1, dtype)
    third = replaced(second, 3, 0.1, dtype)
    if rule == "none":
        third = longer(third, 4, 17, dtype)
    for name, block in (("v1", first), ("v2", second), ("v3", third)):
        write_version(tmp_path / name, block, dtype, rule)
    deltas = [write_delta(tmp_path, "d2", "v1", "v2"), write_delta(tmp_path, "d3", "v2", "v3")]
    open_one = opener(how)
    held = open_one.open(tmp_path / "v1", "v1")
    for name, delta, whole in zip(("d2", "d3"), deltas, ("v2", "v3"), strict=True):
        held = open_one.open(delta, name, held)
        expected = HostTables.open(tmp_path / whole, native=False)
        assert held.digest == tables_digest(tmp_path / whole)
        assert held.overlays
        for policy in POLICIES:
            for out in ("float32", "float16"):
                assert answer(held.rows, some_ids(), policy, out) == answer(expected, some_ids(), policy, out)
        assert answer(held.rows, some_ids()[:0]) == answer(expected, some_ids()[:0])


@pytest.mark.parametrize("how", OPENERS)
def test_overlay_rejects_what_the_whole_version_rejects(tmp_path, how):
    first = rows_of(1, ROWS, "float16")
    write_version(tmp_path / "v1", first)
    write_version(tmp_path / "v2", longer(first, 2, 5, "float16"))
    write_delta(tmp_path, "d2", "v1", "v2")
    held = opener(how).open(tmp_path / "v1", "v1")
    over = opener(how).open(tmp_path / "d2", "d2", held)
    ids = np.zeros((300, 2), np.int64)
    ids[:, 0] = ROWS + 4
    answer(over.rows, ids, "reject")
    ids[257, 1] = ROWS + 5
    with pytest.raises(InputError, match=rf"holds {ROWS + 5} at \[257, 1\]; table 'item' has {ROWS + 5} rows"):
        answer(over.rows, ids, "reject")
    with pytest.raises(InputError, match=rf"has {ROWS} rows"):
        answer(held.rows, ids, "reject")


def test_an_empty_table_grows_by_an_overlay(tmp_path):
    write_version(tmp_path / "v1", rows_of(1, 0, "float16"))
    write_version(tmp_path / "v2", rows_of(1, 4, "float16"))
    write_delta(tmp_path, "d2", "v1", "v2")
    for how in OPENERS:
        held = opener(how).open(tmp_path / "v1", "v1")
        over = opener(how).open(tmp_path / "d2", "d2", held)
        ids = np.asarray([[0, 3], [4, -7]])
        for policy in POLICIES:
            assert answer(over.rows, ids, policy) == answer(HostTables.open(tmp_path / "v2"), ids, policy)
