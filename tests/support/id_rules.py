"""Ids, hashes and vectors that the lookups in every language are held against."""

import json
from pathlib import Path

import numpy as np

from hstu_trt.contract.stored_table import IdRule

VECTORS = json.loads((Path(__file__).parent / "id_vectors.json").read_text())["vectors"]
LOWEST, HIGHEST = -(2**63), 2**63 - 1
IDS = [0, 1, 6, 7, -1, -2, 99, LOWEST, HIGHEST, 5]
PERMUTATION = np.asarray([3, 1, 4, 0, 6, 5, 2], np.uint32)
RULES = {
    "none": (IdRule(default_row=2), None),
    "splitmix64": (IdRule(hash="splitmix64", seed=9, default_row=2), None),
    "permutation": (IdRule(hash="permutation", row_of_id="x", default_row=2), PERMUTATION),
}
