"""Tensors as Triton's client takes them, and what a model that ranks answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc_client
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.text import text_table
from hstu_trt.serving.requests import RankRequest
from hstu_trt.serving.signature import ROW_STATUS, TABLES_VERSION
from hstu_trt.tables.ids import RowStatus


class ServerError(HstuTrtError):
    """The server cannot be reached, has no such model, or failed on a good request."""

    exit_code = 1


@dataclass(frozen=True)
class Answer:
    """What a request got."""

    scores: NDArray
    """``preds``."""
    tables_version: str
    """Name and digest of the tables that answered, as in ``v000002@1f0c5a9be21d``."""
    rows: dict[str, int]
    """How many of the request's rows came from where, by RowStatus in lower case; those with none are left out."""

    @property
    def tables_digest(self) -> str:
        """The same for the same rows, whatever their version is called."""
        return self.tables_version.rpartition("@")[2]

    @property
    def served_text(self) -> str:
        """For people."""
        return f"tables {self.tables_version}, rows: {', '.join(f'{n} {kind}' for kind, n in self.rows.items())}"


def inputs_of(tensors: Tensors) -> list[Any]:
    """Tensors as Triton's client takes them."""
    inputs = []
    for name, array in tensors.items():
        tensor = grpc_client.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(np.ascontiguousarray(array))
        inputs.append(tensor)
    return inputs


def answer_of(result: Any) -> Answer:
    """What Triton's client got, from a model that ranks. Raises ServerError where outputs are missing."""
    found = {name: result.as_numpy(name) for name in ("preds", ROW_STATUS, TABLES_VERSION)}
    if missing := [name for name, array in found.items() if array is None]:
        raise ServerError(f"an answer without {', '.join(missing)}: it is not that of a model that ranks")
    counts = found[ROW_STATUS].reshape(-1, len(RowStatus)).sum(axis=0)
    rows = {status.name.lower(): int(counts[status]) for status in RowStatus if counts[status]}
    return Answer(found["preds"], found[TABLES_VERSION].ravel()[0].decode(), rows)


def ranked_text(config: HstuConfig, request: RankRequest, scores: NDArray) -> str:
    """The candidates of a request as a table, best first by the first task."""
    order = np.argsort(-scores[:, 0], kind="stable")
    features = config.candidate_features
    rows = [
        (rank, *(int(request.candidates[name][item]) for name in features), *(f"{score:.6f}" for score in scores[item]))
        for rank, item in enumerate(order, start=1)
    ]
    return text_table(("rank", *features, *(task.name for task in config.tasks)), rows)
