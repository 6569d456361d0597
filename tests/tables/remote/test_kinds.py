"""Quantised, hashed and permuted tables: the cluster gives the rows and statuses of the host tier, bit by bit."""

import numpy as np
import pytest

from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import write_vector
from hstu_trt.contract.table_format import IdRule, write_table, write_tables_manifest
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.ids import POLICIES, RowStatus
from hstu_trt.tables.quantisers import quantise_rows
from hstu_trt.tables.remote import RemoteTables
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_push import Push
from hstu_trt.tables.table_arrays import PERMUTATION_TENSOR

pytestmark = pytest.mark.redis

ROWS, DIM = 97, 24
VALUES = np.random.default_rng(3).normal(size=(ROWS, DIM)).astype(np.float32) * 50
PERMUTATION = np.random.default_rng(4).permutation(ROWS).astype(np.uint32)
RULES = {
    "plain": IdRule(default_row=7),
    "hashed": IdRule(hash="splitmix64", seed=2**63 + 5),
    "permuted": IdRule(hash="permutation", row_of_id="permuted/row_of_id.safetensors", default_row=7),
}
DTYPES = ("float32", "float16", "int8", "float8_e4m3fn")
NAMES = [f"{rule}_{dtype}" for rule in RULES for dtype in DTYPES]
IDS = np.concatenate([np.arange(ROWS), [-1, -5, ROWS, 2**40, -(2**62), 3, 3, ROWS - 1]])


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder, stored = tmp_path_factory.mktemp("kinds"), []
    (folder / "permuted").mkdir()
    write_vector(folder / "permuted/row_of_id.safetensors", PERMUTATION_TENSOR, PERMUTATION)
    for name in NAMES:
        rule, dtype = name.split("_", 1)
        block = quantise_rows(VALUES, dtype) if dtype in ("int8", "float8_e4m3fn") else VALUES.astype(dtype)
        config = TableConfig(name=name, rows=ROWS, dim=DIM, dtype="float32", features=(name,))
        stored.append(write_table(folder, config, [block], 1000, dtype=dtype, ids=RULES[rule]))
    write_tables_manifest(folder, stored, "test", {"pair_id": "dense 7"})
    return folder


@pytest.fixture(scope="module")
def opened(pushed, kinds):
    with Cluster(ClusterOptions(nodes=pushed.names)) as cluster:
        for name in NAMES:
            Push(cluster, kinds, name, "k1", 16).run()
        yield RemoteTables(cluster, NAMES, versions=dict.fromkeys(NAMES, "k1"), deadline_ms=2000, local=kinds)


@pytest.fixture(scope="module")
def patient(pushed):
    """A client that asks a node again, however often it was given no time."""
    with Cluster(ClusterOptions(nodes=pushed.names, breaker_failures=1_000_000)) as cluster:
        yield cluster


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_those_of_the_host(opened, kinds, name, dtype):
    host = HostTables.open(kinds)
    for policy in POLICIES[1:]:
        options = LookupOptions(policy=policy, padding_id=-1, dtype=dtype)
        expected, told = host.lookup_with_status(name, IDS, options)
        rows, status = opened.lookup(name, IDS, options)
        np.testing.assert_array_equal(rows.view(np.uint8), expected.view(np.uint8), err_msg=policy)
        np.testing.assert_array_equal(status, np.where(told == RowStatus.HOST, RowStatus.REMOTE, told), err_msg=policy)


def test_all_kinds_side_by_side(opened, kinds):
    ids = np.tile(np.arange(50)[:, None], (1, len(NAMES)))
    expected = HostTables.open(kinds).lookup_features(NAMES, ids, dtype="float16")
    rows, status = opened.lookup_features(NAMES, ids, LookupOptions(dtype="float16"))
    np.testing.assert_array_equal(rows, expected)
    assert (status == RowStatus.REMOTE).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_default_row_answers_for_rows_that_nobody_gives(opened, patient, name, dtype):
    lonely = RemoteTables(patient, [name], versions={name: "k1"}, on_failure="default", deadline_ms=2000)
    default_row = lonely.tables[name].ids.default_row
    for policy in ("default_row", "zero", "clamp"):
        options = LookupOptions(policy=policy, padding_id=-1, dtype=dtype)
        rows, status = lonely.lookup(name, IDS, options, deadline_ms=0)
        expected = np.zeros(DIM, dtype)
        if policy == "default_row" and default_row is not None:
            expected = lonely.lookup(name, np.asarray([default_row]), options)[0][0]
            assert expected.any()
        lost = status == RowStatus.UNAVAILABLE
        assert lost[(IDS >= 0) & (IDS < ROWS)].all()
        np.testing.assert_array_equal(rows[lost], np.broadcast_to(expected, (lost.sum(), DIM)))
        assert not rows[IDS == -1].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_local_copy_answers_with_the_same_bits(opened, name):
    options = LookupOptions(policy="row0", padding_id=-1)
    expected, _ = opened.lookup(name, IDS, options)
    rows, status = opened.lookup(name, IDS, options, deadline_ms=0)
    np.testing.assert_array_equal(rows, expected)
    assert set(status.tolist()) <= {RowStatus.HOST, RowStatus.BAD_ID, RowStatus.PADDING}


def test_the_pair_travels_with_the_version(opened):
    assert {version.pair_id for version in opened.tables.values()} == {"dense 7"}
