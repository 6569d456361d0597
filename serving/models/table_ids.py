"""Ids of requests to a model that holds its tables itself: checked against them, and what the rows' status is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import REGENERATE, ModelFolder
from hstu_trt.contract.table_format import read_tables
from hstu_trt.contract.tensors import PADDING_ID, feature_columns
from hstu_trt.tables.ids import Policy, RowStatus, apply_policy


class TableIds:
    """The ids of a model's requests, whose tables are part of the model: an id is a row."""

    def __init__(self, model: ModelFolder, policy: Policy) -> None:
        config = model.ranking_config
        self._default_rows = default_rows(model) if policy == "default_row" else {}
        self.columns = feature_columns(config)
        """Features of each tensor of ids."""
        self._tables = {feature: config.table_of(feature) for feature in config.embedding_features}
        self._rows = {name: [self._tables[feature].rows for feature in self.columns[name]] for name in self.columns}
        self._policy = policy
        self.bad: Counter[str] = Counter()
        """Ids outside each table so far."""

    def all_good(self, tensors: Mapping[str, NDArray]) -> bool:
        """Whether every id ``[n, features]`` is a row of its table, which nearly all requests' are."""
        for name, rows in self._rows.items():
            # A negative int64 is a very large uint64, so the largest one tells of both ends.
            ids = tensors[name].view(np.uint64)
            if len(ids) and any(int(ids[:, n].max()) >= count for n, count in enumerate(rows)):
                return False
        return True

    def checked(self, tensors: Mapping[str, NDArray]) -> Tensors:
        """Ids with the policy applied, by name. Raises InputError for a bad id under ``reject``."""
        for name, features in self.columns.items():
            for feature, bad in zip(features, self._is_bad(name, tensors[name]).sum(axis=0), strict=True):
                if bad:
                    self.bad[self._tables[feature].name] += int(bad)
        return {
            name: apply_policy(
                tensors[name],
                features,
                [self._tables[feature] for feature in features],
                policy=self._policy,
                padding_id=_padding_id(name),
                what=name,
                default_rows=[self._default_rows.get(feature) for feature in features],
            )
            for name, features in self.columns.items()
        }

    def status(self, request: Mapping[str, NDArray]) -> list[NDArray]:
        """Status of a request's ids as they came, by tensor: ``[tokens, features]``.

        An engine does not tell where rows came from, so those that are not padding nor a bad id's are the GPU's.
        """
        found = []
        for name in self.columns:
            if name in request:
                ids = request[name].reshape(-1, len(self.columns[name]))
                given = np.where(self._is_bad(name, ids), RowStatus.BAD_ID, RowStatus.GPU)
                found.append(np.where(ids == _padding_id(name), RowStatus.PADDING, given))
        return found

    def _is_bad(self, name: str, ids: NDArray) -> NDArray:
        return ((ids < 0) | (ids >= np.asarray(self._rows[name]))) & (ids != _padding_id(name))


def default_rows(model: ModelFolder) -> dict[str, int | None]:
    """Feature -> the row that stands in for a bad id; None: a row of zeros. Raises ArtefactError."""
    tables = read_tables(model.tables, regenerate=REGENERATE.format(folder=model.path)).values()
    return {feature: table.ids.default_row for table in tables for feature in table.features}


def count_by_user(users: int, statuses: list[NDArray]) -> NDArray:
    """Statuses whose first dims are users with equally many tokens each -> ``[users, 7]`` int64."""
    kinds = len(RowStatus)
    by_user = np.concatenate([status.reshape(users, -1) for status in statuses], axis=1)
    place = by_user.astype(np.int64) + kinds * np.arange(users)[:, None]
    return np.bincount(place.ravel(), minlength=kinds * users).reshape(users, kinds)


def _padding_id(ids: str) -> int | None:
    """The id that stands for a missing slot: only contextual features have those."""
    return PADDING_ID if ids == "contextual_ids" else None
