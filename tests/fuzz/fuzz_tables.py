"""Damaged tables, deltas, settings and id maps, to the readers in Python: a refusal by name, or a sound read.

    python tests/fuzz/fuzz_tables.py --seconds 60

Every case is made from a number, which is printed with what went wrong: ``--target NAME --only NUMBER`` repeats it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
from harness import Target, files_in, main

from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import QuantisedRows, write_vector
from hstu_trt.contract.stored_table import IdRule
from hstu_trt.contract.table_format import read_tables_folder, write_table, write_tables_manifest
from hstu_trt.contract.table_versions import current_tables
from hstu_trt.tables.delta import apply_delta, make_delta, read_delta
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.ids import POLICIES
from hstu_trt.tables.remote_layout import RemoteVersion
from hstu_trt.tables.tier_settings import read_tier_settings
from hstu_trt.tables.tiers import Tiers

ROWS, DIM = 7, 3
SETTINGS = b"""{"default": {"tier": "resident"}, "tables": {"items": {"tier": "remote", "nodes": ["127.0.0.1:1"],
 "deadline_ms": 15, "local_copy": false, "on_failure": "default", "password_file": "p", "tls_ca": "c"}}}"""


def make_tables(folder: Path, seed: int) -> Path:
    """Two tables: plain, and int8 in two shards behind a permutation."""
    rng = np.random.default_rng(seed)
    rule = IdRule(hash="permutation", row_of_id="items/row_of_id.safetensors", default_row=3)
    (folder / "items").mkdir(parents=True)
    write_vector(folder / "items/row_of_id.safetensors", "row_of_id", np.arange(ROWS, dtype=np.uint32)[::-1].copy())
    rows = QuantisedRows(rng.integers(-9, 9, (ROWS, DIM), dtype=np.int8), np.full(ROWS, 0.5, np.float32))
    items = TableConfig(name="items", rows=ROWS, dim=DIM, dtype="float32", features=("item",))
    users = TableConfig(name="users", rows=ROWS, dim=DIM, dtype="float16", features=("user",))
    stored = [
        write_table(folder, items, [rows], shard_bytes=12, dtype="int8", ids=rule, row_order="rank"),
        write_table(folder, users, [rng.normal(size=(ROWS, DIM)).astype(np.float16)]),
    ]
    write_tables_manifest(folder, stored, "fuzz", {"pair_id": "p"})
    return folder


def read_tables(folder: Path) -> None:
    """Opens, by mapping and by reading, and looks every row up under every policy."""
    for verify, resident in ((True, False), (False, True), (False, False)):
        tables = HostTables.open(folder, verify=verify, resident=resident)
        for name, table in tables.tables.items():
            # What says that it is huge has no file of that size, and would have been refused.
            assert table.rows < 1_000_000, table.rows
            ids = np.arange(-2, table.rows + 2)
            for policy in POLICIES[1:]:
                with np.errstate(all="ignore"):
                    tables.lookup_with_status(name, ids, LookupOptions(policy=policy, dtype="float16"))


def read_settings(folder: Path) -> None:
    """Reads settings, and what they say of the tables beside them."""
    settings = read_tier_settings(folder / "tables.json")
    tiers = Tiers(settings)
    tiers.memory_of(tiers.read_folder(folder / "tables"))


def read_version(folder: Path) -> None:
    """The description of a version in a cluster, as a hash's fields."""
    lines = (folder / "fields").read_bytes().decode("utf-8", "replace").split("\n")
    RemoteVersion.from_fields("items", "v1", dict(line.split("=", 1) for line in lines if "=" in line))


def targets(folder: Path) -> list[Target]:
    """All targets, their files below ``folder``."""
    old, new = make_tables(folder / "old", 0), make_tables(folder / "new", 1)
    found = [read_tables_folder(path, regenerate="fuzz") for path in (old, new)]
    make_delta(found[0], found[1], folder / "delta", lambda name, size: None)

    def apply(delta: Path) -> None:
        read_delta(delta)
        shutil.rmtree(folder / "out", ignore_errors=True)
        read_tables(apply_delta(found[0], delta, folder / "out", lambda name, size: None).path)

    tables = make_tables(folder / "tables", 0)
    settings = folder / "settings"
    shutil.copytree(tables, settings / "tables")
    (settings / "tables.json").write_bytes(SETTINGS)
    versions = folder / "versions"
    shutil.copytree(tables, versions / "v1")
    (versions / "CURRENT").write_text("v1\n")
    described = folder / "described"
    described.mkdir()
    version = RemoteVersion(
        table="items", version="v1", rows=7, dim=3, dtype="int8", features=("item",), partitions=64, digest="d"
    )
    (described / "fields").write_text("\n".join(f"{name}={text}" for name, text in version.fields().items()))
    return [
        *(Target(f"tables: {file}", tables, file, read_tables) for file in files_in(tables)),
        *(Target(f"delta: {file}", folder / "delta", file, apply) for file in files_in(folder / "delta")),
        Target("settings", settings, "tables.json", read_settings),
        Target("version in use", versions, "CURRENT", lambda path: read_tables(current_tables(path))),
        Target("version in a cluster", described, "fields", read_version),
    ]


if __name__ == "__main__":
    sys.exit(main(__doc__, targets))
