"""Workloads: requests for a DlrmHSTU model as arrays, and as the jagged features that the model reads.

The file format is one .npz, CSR style, with R requests, E history events and K candidates:

    user_id [R] i32      uih_off [R+1] i64   uih_item [E] i32   uih_weight [E] u8   uih_ts [E] i32
    key [R, 2] i32       cand_off [R+1] i64  cand_item [K] i32  query_time [R] i32

``key`` is (time slot, number within the slot). Bit i of ``uih_weight`` is set if the event has action type i. Ids of
other features than the item follow from it: the category of an item is ``item // items_per_category``.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Jagged
from hstu_trt.contract.model import HstuConfig

Features = dict[str, Jagged]

_DTYPES = {
    "user_id": "int32",
    "uih_off": "int64",
    "uih_item": "int32",
    "uih_weight": "uint8",
    "uih_ts": "int32",
    "cand_off": "int64",
    "cand_item": "int32",
    "query_time": "int32",
    "key": "int32",
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests in the order in which they are sent; see the module's text for the arrays. Validated on creation."""

    user_id: NDArray
    uih_off: NDArray
    uih_item: NDArray
    uih_weight: NDArray
    uih_ts: NDArray
    cand_off: NDArray
    cand_item: NDArray
    query_time: NDArray
    key: NDArray

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            dims = 2 if name == "key" else 1
            if str(array.dtype) != dtype or array.ndim != dims:
                raise InputError(
                    f"workload: {name} must be {dtype} with {dims} axes, got {array.dtype} {list(array.shape)}"
                )
        requests = len(self.user_id)
        _check_shape("query_time", self.query_time, (requests,))
        _check_shape("key", self.key, (requests, 2))
        _check_offsets("uih_off", self.uih_off, requests, "uih_item", len(self.uih_item))
        _check_offsets("cand_off", self.cand_off, requests, "cand_item", len(self.cand_item))
        for name in ("uih_weight", "uih_ts"):
            _check_shape(name, getattr(self, name), self.uih_item.shape)

    def __len__(self) -> int:
        return len(self.user_id)

    @property
    def history_lengths(self) -> NDArray:
        """History events per request, int64 [R]."""
        return np.diff(self.uih_off)

    @property
    def candidate_counts(self) -> NDArray:
        """Candidates per request, int64 [R]."""
        return np.diff(self.cand_off)

    def save(self, path: Path) -> None:
        """Writes the .npz; the same workload gives the same bytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            np.savez(stream, **{name: getattr(self, name) for name in _DTYPES})

    @classmethod
    def load(cls, path: Path) -> Workload:
        """Reads and validates a .npz, or every .npz of a folder in the order of their names."""
        if path.is_dir():
            parts = sorted(path.glob("*.npz"))
            if not parts:
                raise InputError(
                    f"{path} holds no workload (*.npz); make one with: hstu-trt bench workload --out {path}"
                )
            return concatenate([cls.load(part) for part in parts])
        try:
            with zipfile.ZipFile(path) as archive:  # np.savez compresses nothing: what is packed may be without bounds
                if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
                    raise InputError(f"{packed[0]!r} is compressed")
            with np.load(path) as arrays:
                return cls(**{name: arrays[name] for name in _DTYPES})
        except FileNotFoundError:
            raise InputError(f"no workload at {path}; make one with: hstu-trt bench workload --out FOLDER") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # numpy's and zipfile's readers raise whatever a wrong byte leads them to
            raise InputError(f"{path} is not a workload ({error!r})") from None

    def take(self, rows: Sequence[int] | NDArray) -> Workload:
        """The requests ``rows``, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        uih, uih_off = gather(self.uih_off[:-1][rows], self.history_lengths[rows])
        candidates, cand_off = gather(self.cand_off[:-1][rows], self.candidate_counts[rows])
        return Workload(
            user_id=self.user_id[rows],
            uih_off=uih_off,
            uih_item=self.uih_item[uih],
            uih_weight=self.uih_weight[uih],
            uih_ts=self.uih_ts[uih],
            cand_off=cand_off,
            cand_item=self.cand_item[candidates],
            query_time=self.query_time[rows],
            key=self.key[rows],
        )

    def features(self, config: HstuConfig, row: int) -> tuple[Features, Features]:
        """One request as (history and contextual features, candidate features) of a model."""
        return self.batch(config, [row])

    def batch(self, config: HstuConfig, rows: Sequence[int] | NDArray) -> tuple[Features, Features]:
        """Several requests as the jagged features that ``contract.features.pack_request`` takes.

        Raises InputError if an item is beyond the model's table.
        """
        part = self.take(rows)
        history, counts = part.history_lengths, part.candidate_counts
        uih = {name: Jagged(_ids(config, name, part.uih_item), history) for name in config.uih_features}
        uih[config.action_time_feature] = Jagged(part.uih_ts.astype(np.int64), history)
        if config.action_weights is not None and config.action_weight_feature is not None:
            uih[config.action_weight_feature] = Jagged(_actions(config.action_weights, part.uih_weight), history)
        uih |= _contextual(config, part.user_id)
        candidates = {name: Jagged(_ids(config, name, part.cand_item), counts) for name in config.candidate_features}
        asked = np.repeat(part.query_time.astype(np.int64), counts)
        candidates[config.query_time_feature] = Jagged(asked, counts)
        return uih, candidates


def concatenate(parts: Sequence[Workload]) -> Workload:
    """Several workloads, one after the other."""

    def joined(name: str) -> NDArray:
        arrays = [getattr(part, name) for part in parts]
        if name not in ("uih_off", "cand_off"):
            return np.concatenate(arrays)
        lengths = np.concatenate([np.diff(offsets) for offsets in arrays])
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    return Workload(**{field.name: joined(field.name) for field in fields(Workload)})


def _check_shape(name: str, array: NDArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise InputError(f"workload: {name} must have shape {list(shape)}, got {list(array.shape)}")


def _check_offsets(name: str, offsets: NDArray, requests: int, values_name: str, values: int) -> None:
    _check_shape(name, offsets, (requests + 1,))
    if offsets[0] != 0:
        raise InputError(f"workload: {name} must begin with 0, got {offsets[0]} at [0]")
    falling = np.flatnonzero(np.diff(offsets) < 0)
    if falling.size:
        at = int(falling[0])
        raise InputError(f"workload: {name} falls from {offsets[at]} at [{at}] to {offsets[at + 1]} at [{at + 1}]")
    if offsets[-1] != values:
        raise InputError(f"workload: {name} ends with {offsets[-1]}, but {values_name} has {values} entries")


def gather(starts: NDArray, lengths: NDArray) -> tuple[NDArray, NDArray]:
    """Positions of the runs ``[start, start + length)`` laid end to end, and the runs' offsets int64 [runs + 1]."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets


def _ids(config: HstuConfig, feature: str, items: NDArray) -> NDArray:
    """Ids of a feature of the given items: the items themselves, or the group that they belong to."""
    item_table, table = config.table_of(config.post_id_feature), config.table_of(feature)
    outside = np.flatnonzero((items < 0) | (items >= item_table.rows))
    if outside.size:
        at = int(outside[0])
        raise InputError(
            f"workload: item {items[at]} (number {at} of feature {feature!r}) is not in table {item_table.name!r} "
            f"with {item_table.rows} rows; generate the workload for this model"
        )
    per_group = 1 if table == item_table else -(-item_table.rows // table.rows)
    return items.astype(np.int64) // per_group


def _actions(weights: Sequence[int], bits: NDArray) -> NDArray:
    """The model's action mask of each event: the sum of the weights of its action types."""
    masks = np.zeros(len(bits), dtype=np.int64)
    for i, weight in enumerate(weights[:8]):
        masks += np.where(bits >> i & 1, weight, 0)
    return masks


def _contextual(config: HstuConfig, users: NDArray) -> Mapping[str, Jagged]:
    """Each contextual feature with all its slots filled: ids that follow from the user's."""
    features = {}
    for feature in config.contextual_features:
        rows = config.table_of(feature.name).rows
        ids = (users.astype(np.int64)[:, None] + np.arange(feature.slots)) % rows
        features[feature.name] = Jagged(ids.ravel(), np.full(len(users), feature.slots, dtype=np.int64))
    return features
