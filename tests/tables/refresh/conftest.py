"""A folder of versions, and overlays as large as these small tables need."""

import pytest
from table_versions import make_store

from hstu_trt.tables import refresh


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path)


@pytest.fixture(autouse=True)
def roomy_overlays(monkeypatch):
    """A tenth of tables this small is less than one row in ten."""
    monkeypatch.setattr(refresh, "OVERLAY_SHARE", 2.0)
