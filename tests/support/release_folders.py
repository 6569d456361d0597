"""Folders of versions: models without graphs, and tables, all small."""

import dataclasses
import shutil

import numpy as np
from small_models import LIMITS, small_config

from hstu_trt.contract.model_folder import onnx_stages, read_model_folder, write_model_folder
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.contract.table_versions import publish_version

ROWS, DIM = 9, 4


def write_tables(folder, value, pair_id, rows=ROWS, dim=DIM):
    tables = []
    for table in small_config().tables:
        config = dataclasses.replace(table, rows=rows, dim=dim)
        block = np.full((rows, dim), value, np.float16)
        tables.append(write_table(folder, config, [block]))
    write_tables_manifest(folder, tables, "a test", {"pair_id": pair_id})
    return folder


def write_model(folder, value, pair_id, *, config=None, limits=LIMITS, precision="fp32", rows=ROWS, weights=""):
    config = config or small_config()
    config = dataclasses.replace(config, tables=tuple(dataclasses.replace(t, rows=rows) for t in config.tables))
    write_tables(folder / "tables", value, pair_id, rows)
    for name in (*(f"{stage}.onnx" for stage in onnx_stages(config)), "weights.safetensors"):
        (folder / name).write_bytes(f"{name} of {pair_id} {weights}".encode())
    facts = {} if pair_id is None else {"pair_id": pair_id}
    write_model_folder(
        folder, name="small", config=config, limits=limits, precision=precision, made_by="a test", facts=facts
    )
    return read_model_folder(folder)


def publish(folder, name):
    publish_version(folder.path / name, regenerate="")


def move_behind_link(path, away):
    shutil.move(path, away)
    path.symlink_to(away)


class AnyStep:
    """A step that takes anything."""

    def infer(self, feed):
        return {}
