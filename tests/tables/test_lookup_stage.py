"""The embedding stage on the host: it serves tables of the model's own checkpoint only."""

import dataclasses

import numpy as np
import pytest

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model_folder import read_model_folder, write_model_folder
from hstu_trt.contract.presets import debug
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.contract.tensors import Limits
from hstu_trt.tables.lookup_stage import HostLookup

LIMITS = Limits(users=4, history=16, candidates=6, batch_history=24, batch_candidates=12)


def model_folder(folder, model_pair, tables_pair):
    config = debug()
    tables = tuple(dataclasses.replace(table, rows=9, dim=4) for table in config.tables)
    config = dataclasses.replace(config, embedding_dim=4, tables=tables)
    rows = np.arange(36, dtype=np.float16).reshape(9, 4)
    stored = [write_table(folder / "tables", table, [rows]) for table in config.tables]
    write_tables_manifest(folder / "tables", stored, "a test", {"pair_id": tables_pair})
    facts = {"pair_id": model_pair}
    write_model_folder(folder, name="m", config=config, limits=LIMITS, precision="fp32", made_by="a test", facts=facts)
    return read_model_folder(folder)


@pytest.mark.parametrize(("model_pair", "tables_pair"), [("a", "a"), (None, "a"), ("a", None), (None, None)])
def test_tables_of_the_same_checkpoint_are_served(tmp_path, model_pair, tables_pair):
    model = model_folder(tmp_path, model_pair, tables_pair)
    assert model.pair_id == model_pair
    HostLookup(model)


def test_tables_of_another_checkpoint_are_refused(tmp_path):
    with pytest.raises(ArtefactError, match=r"belongs to the dense weights b, the model .* has a; export both"):
        HostLookup(model_folder(tmp_path, "a", "b"))
