"""Tables to work on."""

import numpy as np
import pytest
from table_tools import COUNTS, KINDS, ROWS, convert


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "items.npy", ROWS)
    np.save(tmp_path / "kinds.npy", KINDS)
    np.save(tmp_path / "counts.npy", COUNTS)
    assert convert(tmp_path, "v1") == 0
    return tmp_path
