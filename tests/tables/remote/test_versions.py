"""Versions that a server opens one after the other, with tables in every tier: whole, delta, folded, refused."""

import numpy as np
import pytest
from remote_tables import push, write_folder

from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.tables import refresh
from hstu_trt.tables.delta import make_delta
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.ids import RowStatus
from hstu_trt.tables.refresh import RefreshOptions, VersionOpener
from hstu_trt.tables.remote_cluster import Cluster, ClusterOptions
from hstu_trt.tables.remote_resp import RemoteError
from hstu_trt.tables.tier_settings import TierSettings
from hstu_trt.tables.tiers import TieredTables, Tiers

pytestmark = pytest.mark.redis

ALL = ["item", "user", "candidate"]
IDS = np.random.default_rng(8).integers(0, 311, (500, 3))
HALF = LookupOptions(dtype="float16")


@pytest.fixture
def opener(pushed):
    """Items remote, users resident, as a server's opener has them."""
    item = {"tier": "remote", "nodes": list(pushed.names), "deadline_ms": 2000}
    tiers = Tiers(TierSettings.from_json({"tables": {"items": item, "users": {"tier": "resident"}}}))
    yield VersionOpener(
        open_tables=tiers.open_tables,
        memory_of=tiers.memory_of,
        may_lack=tiers.may_lack_files,
        options=RefreshOptions(memory_budget=1 << 20),
    )
    tiers.close()


def look_up(version, host):
    """Statuses of a lookup, whose rows must be those of tables on disk."""
    rows, status = version.rows.lookup_features_with_status(ALL, IDS, HALF)
    expected, _ = HostTables.open(host).lookup_features_with_status(ALL, IDS, HALF)
    np.testing.assert_array_equal(rows, expected)
    return [set(column.tolist()) for column in status.T]


def write_with(folder, changed):
    """The tables of v1 with other rows in one of them."""
    write_folder(folder)
    other = write_folder(folder.parent / f"{folder.name}-other", seed=41)
    found, donor = (read_tables_folder(path, regenerate="") for path in (folder, other))
    for shard in found.tables[changed].shards:
        (folder / shard.file).write_bytes((other / shard.file).read_bytes())
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    for shard in found.tables[changed].shards:
        text = text.replace(found.files[shard.file]["sha256"], donor.files[shard.file]["sha256"])
    manifest.write_text(text)
    return folder


def test_versions_of_tiered_tables(opener, pushed, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(refresh, "OVERLAY_SHARE", 2.0)
    root = tmp_path / "versions"
    first = write_folder(root / "v1")
    held = opener.open(first, "v1")
    assert isinstance(held.rows, TieredTables)
    assert look_up(held, first) == [{RowStatus.REMOTE}, {RowStatus.HOST}, {RowStatus.REMOTE}]
    # Other users: items stay those of the same version in the cluster, one round trip for both features.
    second = write_with(tmp_path / "v2", "users")
    whole = [read_tables_folder(path, regenerate="") for path in (first, second)]
    make_delta(*whole, root / "d2", lambda *_: None)
    laid = opener.open(root / "d2", "d2", held)
    assert laid.overlays.keys() == {"users"}
    assert isinstance(laid.rows, TieredTables)
    assert look_up(laid, second) == [{RowStatus.REMOTE}, {RowStatus.HOST}, {RowStatus.REMOTE}]
    assert look_up(held, first), "a request that began before"
    # Other items: over the remote rows, whatever the cluster holds.
    third = write_with(tmp_path / "v3", "items")
    make_delta(*(read_tables_folder(path, regenerate="") for path in (first, third)), root / "d3", lambda *_: None)
    wide = VersionOpener(
        open_tables=opener.open_tables, memory_of=opener.memory_of, may_lack=opener.may_lack,
        options=RefreshOptions(memory_budget=1 << 24),
    )  # fmt: skip
    assert look_up(wide.open(root / "d3", "d3", held), third)
    # As a whole version, its rows must be in the cluster.
    with pytest.raises(RemoteError, match="no complete version of table 'items'"):
        opener.open(third, "v3", held)
    with Cluster(ClusterOptions(nodes=pushed.names)) as cluster:
        push(cluster, third, "w3")
    newer = opener.open(third, "v3", held)
    assert look_up(newer, third) == [{RowStatus.REMOTE}, {RowStatus.HOST}, {RowStatus.REMOTE}]
    assert look_up(held, first)
