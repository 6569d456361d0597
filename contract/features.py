"""Requests: from jagged features by name to the packed tensors of the contract, checked on the way.

``Jagged`` is what a data pipeline has: values of all users end to end, and a length per user. ``pack_request``
turns the features of a config into the inputs of the ``ranking`` stage. ``check_request`` refuses a tensor that would
make a stage answer wrongly, and names tensor, position and value.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.tensors import PADDING_ID, Limits, StageSpec, TensorSpec

Tensors = dict[str, NDArray]


@dataclass(frozen=True)
class Jagged:
    """Values ``[sum of lengths]`` int64 of one feature over all users, and lengths ``[users]`` int64."""

    values: NDArray
    lengths: NDArray

    @classmethod
    def of(cls, name: str, values: ArrayLike, lengths: ArrayLike) -> Jagged:
        """Checks and wraps one feature. Raises InputError naming the feature."""
        v, n = np.asarray(values), np.asarray(lengths)
        for what, array in (("values", v), ("lengths", n)):
            if array.ndim != 1:
                raise InputError(f"feature {name!r}: {what} must be 1-D, got shape {list(array.shape)}")
            if array.size and not (np.issubdtype(array.dtype, np.integer) and np.can_cast(array.dtype, np.int64)):
                raise InputError(f"feature {name!r}: {what} must be integers that fit int64, got {array.dtype}")
        if n.size and n.min() < 0:
            at = int(n.argmin())
            raise InputError(f"feature {name!r}: lengths[{at}] is {n[at]}, a length cannot be negative")
        if int(n.sum()) != v.size:
            raise InputError(f"feature {name!r}: lengths sum to {int(n.sum())}, but there are {v.size} values")
        return cls(v.astype(np.int64), n.astype(np.int64))

    @classmethod
    def of_lists(cls, name: str, users: Sequence[Sequence[int]]) -> Jagged:
        """Wraps one list of values per user."""
        values = [value for user in users for value in user]
        return cls.of(name, np.asarray(values, dtype=np.int64), [len(user) for user in users])


def jagged_features(tensors: Mapping[str, NDArray], side: str, used: Container[str] | None = None) -> dict[str, Jagged]:
    """The features ``<side>.<feature>.values|lengths`` of a file; other tensors are ignored.

    used: the features to read, so that a label or another unused one may be anything; None reads all.

    Raises InputError if one of a pair is missing or the two disagree.
    """
    features = {}
    for key in tensors:
        parts = key.split(".")
        if parts[0] != side or parts[-1] not in ("values", "lengths") or len(parts) < 3:
            continue
        name = ".".join(parts[1:-1])
        if used is not None and name not in used:
            continue
        pair = [f"{side}.{name}.{part}" for part in ("values", "lengths")]
        for other in pair:
            if other not in tensors:
                raise InputError(f"tensor {other!r} is missing beside {key!r}")
        features[name] = Jagged.of(f"{side}.{name}", *(tensors[other] for other in pair))
    return features


def offsets_of(lengths: NDArray) -> NDArray:
    """Lengths ``[users]`` -> INT32 offsets ``[users + 1]``, beginning with 0."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def pack_request(config: HstuConfig, uih: Mapping[str, Jagged], candidates: Mapping[str, Jagged]) -> Tensors:
    """Packs jagged features into the inputs of the ``ranking`` stage.

    uih: history and contextual features; candidates: candidate features. Features that the model does not use are
    ignored. Raises InputError when one is missing or its lengths disagree with the others'.
    """
    history = _aligned(config.uih_features, uih, "history")
    items = _aligned(config.candidate_features, candidates, "candidate")
    _same_users("history", history, "candidate", items)
    history_lengths, item_lengths = history[0].lengths, items[0].lengths
    packed: Tensors = {
        "uih_ids": _columns(history),
        "uih_timestamps": _payload(config.action_time_feature, uih, history_lengths, config.post_id_feature),
        "uih_offsets": offsets_of(history_lengths),
        "candidate_ids": _columns(items),
        "candidate_timestamps": _payload(
            config.query_time_feature, candidates, item_lengths, config.candidate_features[0]
        ),
        "candidate_offsets": offsets_of(item_lengths),
    }
    if config.action_weights is not None and config.action_weight_feature is not None:
        packed["uih_actions"] = _payload(config.action_weight_feature, uih, history_lengths, config.post_id_feature)
    if config.contextual_features:
        packed["contextual_ids"] = _contextual(config, uih, len(history_lengths))
    return packed


def request_features(config: HstuConfig) -> frozenset[str]:
    """The features that ``pack_request`` reads."""
    payload = (config.action_time_feature, config.query_time_feature, config.action_weight_feature)
    return frozenset({*config.embedding_features, *(name for name in payload if name is not None)})


def _get(name: str, features: Mapping[str, Jagged], kind: str) -> Jagged:
    if name not in features:
        raise InputError(f"{kind} feature {name!r} is missing; given: {', '.join(sorted(features)) or 'none'}")
    return features[name]


def _aligned(names: Sequence[str], features: Mapping[str, Jagged], kind: str) -> list[Jagged]:
    found = [_get(name, features, kind) for name in names]
    for name, feature in zip(names, found, strict=True):
        _same_lengths(name, feature.lengths, names[0], found[0].lengths)
    return found


def _payload(name: str, features: Mapping[str, Jagged], lengths: NDArray, like: str) -> NDArray:
    feature = _get(name, features, "payload")
    _same_lengths(name, feature.lengths, like, lengths)
    return feature.values


def _same_lengths(name: str, lengths: NDArray, like: str, expected: NDArray) -> None:
    if len(lengths) != len(expected):
        raise InputError(f"feature {name!r} has {len(lengths)} users, feature {like!r} has {len(expected)}")
    wrong = np.flatnonzero(lengths != expected)
    if wrong.size:
        user = int(wrong[0])
        raise InputError(
            f"feature {name!r} has length {lengths[user]} for user {user}, feature {like!r} has {expected[user]}"
        )


def _same_users(kind_a: str, a: list[Jagged], kind_b: str, b: list[Jagged]) -> None:
    if len(a[0].lengths) != len(b[0].lengths):
        raise InputError(f"{kind_a} features have {len(a[0].lengths)} users, {kind_b} features {len(b[0].lengths)}")


def _columns(features: list[Jagged]) -> NDArray:
    return np.stack([feature.values for feature in features], axis=1)


def _contextual(config: HstuConfig, uih: Mapping[str, Jagged], users: int) -> NDArray:
    """Pads or cuts each contextual feature to its slots: ids ``[users, slots]``, PADDING_ID where there is none."""
    blocks = []
    for contextual in config.contextual_features:
        feature = _get(contextual.name, uih, "contextual")
        if len(feature.lengths) != users:
            raise InputError(f"feature {contextual.name!r} has {len(feature.lengths)} users, the history has {users}")
        padding = np.flatnonzero(feature.values == PADDING_ID)
        if padding.size:
            raise InputError(
                f"feature {contextual.name!r} holds {PADDING_ID} at [{padding[0]}], which marks a missing id; "
                "leave the id out and shorten the user's length instead"
            )
        starts = np.concatenate([[0], np.cumsum(feature.lengths)])[:-1, None]
        slot = np.arange(contextual.slots)[None, :]
        present = slot < feature.lengths[:, None]
        padded = np.append(feature.values, PADDING_ID)
        blocks.append(np.where(present, padded[np.where(present, starts + slot, -1)], PADDING_ID))
    return np.concatenate(blocks, axis=1).astype(np.int64)


def check_request(tensors: Mapping[str, NDArray], spec: StageSpec, limits: Limits, *, finite: bool = True) -> None:
    """Checks dtypes, shapes, offsets and limits of a packed request against a stage's inputs.

    finite: whether NaN and Inf are looked for.

    Ids are checked where they are looked up, since only the tables know their rows. Raises InputError that names
    tensor, position and value.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for expected in spec.inputs:
        if expected.name not in tensors:
            raise InputError(f"tensor {expected.name!r} {expected.dtype} {expected.shape_text} is missing")
        _check_tensor(tensors[expected.name], expected, sizes)
        if finite and tensors[expected.name].dtype.kind == "f":
            check_finite(expected.name, tensors[expected.name])
    _check_related_sizes(sizes)
    if "attention_norm" in tensors and not (tensors["attention_norm"] > 0).all():
        at = int(np.argmin(tensors["attention_norm"] > 0))
        raise InputError(f"tensor 'attention_norm' holds {tensors['attention_norm'][at]} at [{at}]; it must be > 0")
    _check_offsets(tensors, "uih_offsets", "uih_timestamps", limits.history, "history events", allow_empty=True)
    _check_offsets(
        tensors, "candidate_offsets", "candidate_timestamps", limits.candidates, "candidates", allow_empty=False
    )


def _check_tensor(array: NDArray, spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> None:
    """Dtype and shape of one tensor. sizes: of each dim so far, and the tensor that had it first; added to."""
    name = spec.name
    if array.dtype != spec.dtype:
        raise InputError(f"tensor {name!r} must be {spec.dtype}, got {array.dtype}")
    if array.ndim != len(spec.dims):
        raise InputError(f"tensor {name!r} must have shape {spec.shape_text}, got {list(array.shape)}")
    for axis, (size, dim) in enumerate(zip(array.shape, spec.dims, strict=True)):
        if isinstance(dim, int):
            if size != dim:
                raise InputError(f"tensor {name!r} must have shape {spec.shape_text}, got {list(array.shape)}")
            continue
        if not dim.min <= size <= dim.max:
            raise InputError(f"tensor {name!r} has {size} {dim.name} on axis {axis}; {dim.min} to {dim.max} are served")
        known, by = sizes.setdefault(dim.name, (size, name))
        if known != size:
            raise InputError(f"tensor {name!r} has {size} {dim.name} on axis {axis}, but {by!r} has {known}")


def _check_related_sizes(sizes: Mapping[str, tuple[int, str]]) -> None:
    """Sizes that follow from one another: users and their offsets and norms, tokens and their flat ids."""
    if "users_plus_1" in sizes:
        plus_one, by = sizes["users_plus_1"]
        allowed = {"users": (plus_one - 1,), "norms": (1, plus_one - 1)}
        for dim, counts in allowed.items():
            size, name = sizes.get(dim, (plus_one - 1, ""))
            if size not in counts:
                raise InputError(f"tensor {name!r} has {size} {dim}, but {by!r} has {plus_one - 1} users")
    for dim, (size, name) in sizes.items():
        tokens, _, per_token = dim.rpartition("_x_")
        if tokens in sizes and size != sizes[tokens][0] * int(per_token):
            count, by = sizes[tokens]
            raise InputError(f"tensor {name!r} has {size} ids, but {by!r} has {count} {tokens} of {per_token} ids each")


def check_finite(name: str, array: NDArray) -> None:
    """Refuses NaN and Inf, naming the first."""
    bad = ~np.isfinite(array)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise InputError(f"tensor {name!r} holds {array[at]} at {list(at)}; only finite values are served")


def _check_offsets(
    tensors: Mapping[str, NDArray], name: str, values_name: str, limit: int, what: str, *, allow_empty: bool
) -> None:
    if name not in tensors:
        return
    offsets = tensors[name].astype(np.int64)
    if offsets[0] != 0:
        raise InputError(f"tensor {name!r} must begin with 0, got {offsets[0]} at [0]")
    lengths = offsets[1:] - offsets[:-1]
    if (lengths < 0).any():
        at = int(np.flatnonzero(lengths < 0)[0])
        raise InputError(f"tensor {name!r} falls from {offsets[at]} at [{at}] to {offsets[at + 1]} at [{at + 1}]")
    if values_name in tensors and offsets[-1] != tensors[values_name].shape[0]:
        size = tensors[values_name].shape[0]
        raise InputError(
            f"tensor {name!r} ends with {offsets[-1]} at [{len(offsets) - 1}], but {values_name!r} has {size}"
        )
    if (lengths > limit).any():
        user = int(np.flatnonzero(lengths > limit)[0])
        raise InputError(f"user {user} has {lengths[user]} {what} ({name!r}); at most {limit} are served")
    if not allow_empty and (lengths == 0).any():
        user = int(np.flatnonzero(lengths == 0)[0])
        raise InputError(f"user {user} has no {what} ({name!r}); at least one is needed")


def batch_max_norm(config: HstuConfig, tensors: Mapping[str, NDArray]) -> float:
    """The reference's N: longest history plus most candidates of the batch, plus the contextual tokens."""
    longest = int(np.diff(tensors["uih_offsets"]).max(initial=0))
    most = int(np.diff(tensors["candidate_offsets"]).max(initial=0))
    return float(longest + most + len(config.contextual_slots))
