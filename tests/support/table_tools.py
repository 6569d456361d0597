"""Two small tables on disk, and `hstu-trt tables` on them."""

import numpy as np

from hstu_trt.contract.cli import main as command_line
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.tables.host import HostTables

ROWS = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
KINDS = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float16)
COUNTS = np.random.default_rng(2).permutation(40) * 10


def run(*arguments):
    return command_line(["tables", *(str(argument) for argument in arguments)])


def convert(folder, out, *more):
    sources = [f"--table=items={folder}/items.npy", f"--table=kinds={folder}/kinds.npy"]
    return run("convert", *sources, "--shard-rows", 16, "--out", folder / out, *more)


def rows_of(folder, table="items", rows=40):
    return HostTables.open(folder).lookup(table, np.arange(rows))


def read(folder):
    return read_tables_folder(folder, regenerate="x")
