"""What the models of the flavour ``cuda`` compute, free of Triton."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.features import Tensors, check_request
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.split_users import one_user_feeds
from hstu_trt.contract.tensors import ENSEMBLE
from hstu_trt.engines.cuda.memory import naming_lack_of_memory
from hstu_trt.engines.cuda.runner import CudaModel, CudaOptions, FusedRunner, step_of
from hstu_trt.engines.cuda.staging import UserFeed
from hstu_trt.serving.models.live_stages import Tally, smallest_feed, text_tensor
from hstu_trt.serving.models.stages import UserBatches
from hstu_trt.serving.models.table_ids import TableIds, count_by_user
from hstu_trt.serving.signature import ATTENTION_NORM, ROW_STATUS, TABLES_VERSION
from hstu_trt.tables.delta import tables_digest
from hstu_trt.tables.ids import Policy, RowStatus
from hstu_trt.tables.version import version_label


@dataclass(frozen=True)
class Taken:
    """A request that was found good."""

    users: list[UserFeed]
    row_status: NDArray
    """``[users, 7]`` int64."""


class OwnTables:
    """The tables of the model folder: they are in the GPU's memory from the start, and stay."""

    def __init__(self, model: ModelFolder, policy: Policy) -> None:
        self.ids, self.tally = TableIds(model, policy), Tally()
        self.version = version_label(model.name, tables_digest(model.tables))
        self._model = model
        self._widths = {name: len(columns) for name, columns in self.ids.columns.items()}

    def look_at(self, request: Mapping[str, NDArray], users: int) -> tuple[Tensors, NDArray]:
        """Ids by name that are not as they came, and where rows come from by user ``[users, 7]``.

        request: ids ``[tokens, features]``; all users have equally many tokens. Raises InputError.
        """
        if self.ids.all_good(request):
            status = np.zeros((users, len(RowStatus)), dtype=np.int64)
            status[:, RowStatus.GPU] = sum(len(request[name]) * width for name, width in self._widths.items()) // users
            return {}, status
        with self.tally.bad_ids(self.ids.bad):
            checked = self.ids.checked(request)
        return checked, count_by_user(users, self.ids.status(request))

    def serves(self, memory_bytes: int) -> dict[str, Any]:
        """What is in use, for metrics."""
        return {
            "tables_version": self.version, "form": "device", "pair_id": self._model.pair_id,
            "dense": self._model.digest, "memory_bytes": memory_bytes, "since": time.time(),
            "instead_of": None,
        }  # fmt: skip


class FusedRequests:
    """Requests of ``ranking_fused``: checked, and cut into users."""

    def __init__(self, model: ModelFolder, tables: OwnTables, attention_norm: float) -> None:
        self._users, self._tables = UserBatches(model), tables
        self._norm = np.asarray([attention_norm], dtype=np.float32)

    def take(self, request: Mapping[str, NDArray]) -> Taken:
        """A request's users. Raises InputError for a wrong one."""
        packed = self._users.pack(request)
        users = len(packed["uih_offsets"]) - 1
        checked, status = self._tables.look_at(packed, users)
        feed = {**packed, **checked, ATTENTION_NORM: self._norm}
        self._tables.tally.add_rows(status)
        return Taken([feed] if users == 1 else list(one_user_feeds(feed)), status)


class DeviceLookup:
    """``embedding_lookup``: it sees, and checks, the whole request; the rows stay on the device."""

    def __init__(self, model: ModelFolder, options: CudaOptions, tables: OwnTables, attention_norm: float) -> None:
        device_model = CudaModel.of_folder(model, options, with_tables=True)
        assert device_model.tables is not None
        self._step, self.table_bytes = step_of(device_model, "embedding_lookup"), device_model.tables.memory_bytes
        self._spec, self._limits, self._tables = model.specs[ENSEMBLE], model.limits, tables
        self._norm = np.asarray([attention_norm], dtype=np.float32)

    def infer(self, request: Mapping[str, NDArray]) -> dict[str, Tensor | NDArray]:
        """Ids -> rows on the device, the attention norm, ``tables_version`` [1], ``row_status`` [7].

        Raises InputError or DeviceMemoryError.
        """
        check_request(request, self._spec, self._limits)
        checked, status = self._tables.look_at(request, 1)
        feed = {name: torch.from_numpy(checked.get(name, request[name])) for name in self._tables.ids.columns}
        self._tables.tally.add_rows(status)
        facts = {TABLES_VERSION: text_tensor(self._tables.version), ROW_STATUS: status[0], ATTENTION_NORM: self._norm}
        with naming_lack_of_memory():
            return {**self._step.run_tensors(feed), **facts}


class DeviceStep:
    """``hstu`` or ``mlp_head`` on tensors that may be on the device.

    Shapes and offsets are checked, since a wrong one would lead a kernel anywhere. That rows are finite is not: it
    would take longer than the stage, and a request that brings rows of its own has no company to spoil.
    """

    def __init__(self, model: ModelFolder, step: str, options: CudaOptions) -> None:
        self._step = step_of(CudaModel.of_folder(model, options, with_tables=False), step)
        self._spec, self._limits = model.specs[step], model.limits

    def infer(self, request: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises InputError or DeviceMemoryError."""
        check_request(
            {name: _shown(tensor) for name, tensor in request.items()}, self._spec, self._limits, finite=False
        )
        with naming_lack_of_memory():
            return self._step.run_tensors(request)


def _shown(tensor: Tensor) -> NDArray:
    """A tensor for a check of shapes; the values too where it is small, as offsets are."""
    if tensor.dtype.is_floating_point and tensor.dim() > 1:
        kind = np.float16 if tensor.dtype == torch.float16 else np.float32
        return np.broadcast_to(np.zeros((), kind), tuple(tensor.shape))
    return tensor.cpu().numpy()


def open_fused(model: ModelFolder, options: CudaOptions, attention_norm: float) -> FusedRunner:
    """The fused model with its tables on the device, warmed: what is loaded at first use must not cost a request."""
    runner = FusedRunner(CudaModel.of_folder(model, options, with_tables=True), model.limits)
    norm = np.asarray([attention_norm], dtype=np.float32)
    runner.run({**smallest_feed(model.specs[ENSEMBLE]), ATTENTION_NORM: norm})
    return runner
