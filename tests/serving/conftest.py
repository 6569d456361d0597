"""The golden checkpoint as a deployment; and model folders without graphs: enough to assemble, to lint, and to run
stages on stand-in runners."""

from collections.abc import Callable

import numpy as np
import pytest
from small_models import LIMITS, small_config

from hstu_trt.contract.model_folder import ModelFolder, read_model_folder, write_model_folder
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.deployment import Deployment


@pytest.fixture(scope="session")
def deployment(exported, tmp_path_factory) -> Deployment:
    """The golden checkpoint, as it is by default."""
    model = read_model_folder(exported("fp32"))
    return assemble(model, tmp_path_factory.mktemp("deployment") / "ckptA", Options())


@pytest.fixture
def make_model(tmp_path) -> Callable[..., ModelFolder]:
    """``make_model(config, precision)`` writes a model folder that holds tables and a manifest, but no graph."""

    def make(config=None, precision="fp32", limits=LIMITS) -> ModelFolder:
        config = config or small_config()
        folder = tmp_path / "model"
        rows = np.arange(36, dtype=np.float16).reshape(9, 4)
        tables = [write_table(folder / "tables", table, [rows]) for table in config.tables]
        write_tables_manifest(folder / "tables", tables, "a test", {})
        write_model_folder(
            folder, name="small", config=config, limits=limits, precision=precision, made_by="a test", facts={}
        )
        return read_model_folder(folder)

    return make
