"""A folder of versions, and what serves it."""

import pytest
from release_folders import ROWS, write_model, write_tables

from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.serving.models.live_models import LiveRows, Place
from hstu_trt.serving.refresh.releases import ReleaseFolder
from hstu_trt.tables.delta import make_delta
from hstu_trt.tables.refresh import VersionOpener


@pytest.fixture
def folder(tmp_path):
    """A model of the pair A; versions: v1 of A, d2 a delta on it, b3 a model of B, v4 tables of B."""
    model = write_model(tmp_path / "model", 1, "A")
    root = tmp_path / "versions"
    write_tables(root / "v1", 2, "A")
    whole = write_tables(tmp_path / "whole", 2, "A", rows=ROWS + 1)
    make_delta(
        *(read_tables_folder(path, regenerate="") for path in (root / "v1", whole)), root / "d2", lambda *_: None
    )
    write_model(root / "b3", 4, "B")
    write_tables(root / "v4", 5, "B")
    return ReleaseFolder(root, model)


@pytest.fixture
def place(folder, tmp_path):
    return Place.of_server(tmp_path / "run", name="embedding_lookup", folder=folder, poll_s=60.0, tell=lambda _: None)


@pytest.fixture
def rows(place):
    return LiveRows(place, VersionOpener(), dense_is_fixed=False)
