"""Versions of one small table that follow on each other, and how they are opened and asked."""

import numpy as np

from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.shards import QuantisedRows, write_vector
from hstu_trt.contract.stored_table import IdRule
from hstu_trt.contract.table_format import read_tables_folder, write_table, write_tables_manifest
from hstu_trt.tables.delta import make_delta
from hstu_trt.tables.host import HostTables, LookupOptions
from hstu_trt.tables.refresh import RefreshOptions, VersionOpener

DIM, ROWS = 8, 300
RULES = {
    "none": IdRule(),
    "splitmix64": IdRule(hash="splitmix64", seed=9),
    "permutation": IdRule(hash="permutation", row_of_id="item/row_of_id.safetensors", default_row=1),
}
OPENERS = {"native": {"native": True, "threads": 2}, "numpy": {"native": False}, "resident": {"resident": True}}
POLICIES = ("zero", "clamp", "row0", "default_row")


def rows_of(seed, rows, dtype):
    values = np.random.default_rng(seed)
    if dtype in ("float32", "float16"):
        return values.standard_normal((rows, DIM)).astype(dtype)
    codes = values.integers(-120, 120, (rows, DIM)).astype(np.int8)
    codes = codes if dtype == "int8" else (codes.view(np.uint8) & 0x7E)
    return QuantisedRows(codes, values.random(rows, np.float32))


def replaced(block, seed, share, dtype):
    """The block with a share of its rows others, by a seed."""
    changed = np.random.default_rng(seed).random(len(block)) < share
    other = rows_of(seed + 1000, len(block), dtype)
    if isinstance(block, QuantisedRows):
        return QuantisedRows(
            np.where(changed[:, None], other.values, block.values), np.where(changed, other.scale, block.scale)
        )
    return np.where(changed[:, None], other, block)


def longer(block, seed, rows, dtype):
    more = rows_of(seed, rows, dtype)
    if isinstance(block, QuantisedRows):
        return QuantisedRows(np.concatenate([block.values, more.values]), np.concatenate([block.scale, more.scale]))
    return np.concatenate([block, more])


def write_version(folder, block, dtype="float16", rule="none", pair_id="p"):
    config = TableConfig(name="item", rows=len(block), dim=DIM, dtype="float16", features=("item_id", "twin"))
    shard_bytes = 128 * DIM * (4 if dtype == "float32" else 2 if dtype == "float16" else 1)
    if rule == "permutation":
        order = np.random.default_rng(5).permutation(len(block)).astype(np.uint32)
        write_vector(folder / "item/row_of_id.safetensors", "row_of_id", order)
    table = write_table(folder, config, [block], shard_bytes, dtype=dtype, ids=RULES[rule])
    write_tables_manifest(folder, [table], "a test", {"pair_id": pair_id})
    return folder


def write_delta(root, name, old, new):
    folders = [read_tables_folder(root / version, regenerate="") for version in (old, new)]
    make_delta(*folders, root / name, lambda table, done: None)
    return root / name


def opener(how="native", **options):
    return VersionOpener(
        open_tables=lambda folder: HostTables.open(folder, **OPENERS[how]),
        memory_of=lambda folder: sum(table.payload_bytes for table in folder.tables.values()),
        options=RefreshOptions(**{"memory_budget": 1 << 30, **options}),
    )


def answer(rows, ids, policy="zero", dtype="float32", padding_id=-7):
    options = LookupOptions(policy=policy, padding_id=padding_id, dtype=dtype)
    found, status = rows.lookup_features_with_status(["item_id", "twin"], ids, options)
    return found.tobytes(), status.tobytes()


def some_ids(seed=0, count=500):
    ids = np.random.default_rng(seed).integers(-5, ROWS + 40, (count, 2))
    ids[:3] = [[-7, 0], [ROWS - 1, ROWS], [np.iinfo(np.int64).max, np.iinfo(np.int64).min]]
    return ids


def make_store(tmp_path):
    """v1 to v3, each a tenth changed; d2 and d3 between them, and back to v1; x2 of other dense weights."""
    first = rows_of(1, ROWS, "float16")
    second = replaced(first, 2, 0.1, "float16")
    third = replaced(second, 3, 0.1, "float16")
    for name, block in (("v1", first), ("v2", second), ("v3", third)):
        write_version(tmp_path / name, block)
    write_version(tmp_path / "x2", second, pair_id="other")
    write_delta(tmp_path, "d2", "v1", "v2")
    write_delta(tmp_path, "d3", "v2", "v3")
    write_delta(tmp_path, "back", "v2", "v1")
    return tmp_path


def size_of(folder):
    tables = read_tables_folder(folder, regenerate="").tables
    return sum(table.payload_bytes for table in tables.values())


def flip(store, name):
    path = next((store / name).glob("item/0*.safetensors"))
    content = bytearray(path.read_bytes())
    content[4096 + 3] ^= 1
    path.write_bytes(content)
