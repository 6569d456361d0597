"""``hstu-trt bench remote`` on the test's cluster: rows are complete, and a client that errs is caught."""

import numpy as np
import pytest

from hstu_trt.bench.result_rows import ResultRow
from hstu_trt.bench.tables import remote as bench
from hstu_trt.contract.errors import GateError
from hstu_trt.tables.remote_cluster import RemoteRows
from hstu_trt.tables.remote_layout import RemoteVersion
from hstu_trt.tables.remote_library import remote_library

pytestmark = pytest.mark.redis

VERSION = RemoteVersion(
    table="t", version="v", rows=10**9, dim=2, dtype="float16", features=(), partitions=64, digest="d"
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "CASES", (bench.Case(ids=300, exponent=0.0), bench.Case(ids=40, exponent=1.05)))


@pytest.fixture
def measured(pushed, tmp_path, small):
    pytest.importorskip("redis")
    try:
        yield bench.measure(pushed, tmp_path, 1000, 2)
    finally:
        for node in pushed.nodes:
            if pushed.role(node) == "master":
                for key in node.command("KEYS", "e:{bench_items*"):
                    node.command("DEL", key.decode())


def test_every_client_has_a_row_per_case(measured):
    assert [row.variant for row in measured] == 2 * [bench.OURS, bench.PIPELINE, bench.GROUPED]
    assert len({row.case for row in measured}) == 2
    for row in measured:
        assert ResultRow.from_json(vars(row), "row") == row
        assert set(row.ratio_to) == {bench.OURS, bench.PIPELINE, bench.GROUPED} - {row.variant}
        (server,) = (version for name, version in row.versions.items() if name in ("redis-server", "valkey-server"))
        assert server.split(".")[0] in ("6", "7", "8")
    assert bench.PIPELINE in bench._report(measured)


def test_a_client_with_a_wrong_row_is_caught(small):
    values = np.zeros((1000, bench.DIM), np.float16)
    wrong = {bench.OURS: lambda ids: np.where(ids[:, None] == ids[7], np.float16(1), values[ids])}
    with pytest.raises(GateError, match="hstu-trt gave other rows"):
        bench._case_rows(bench.CASES[0], wrong, values, 1, None)


def test_partitions_in_numpy_are_the_client_s():
    rows, ids = RemoteRows(VERSION), np.asarray([0, 1, 77, 10**9 - 1, 2**62])
    expected = [remote_library().partition(rows.handle, int(row)) for row in ids]
    assert bench.partitions_of(ids, 64).tolist() == expected
