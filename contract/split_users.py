"""Running the users of a batch one by one.

No user sees another: N comes in as ``attention_norm`` and is not taken from the batch. So on a CPU a runner may take
the users one by one: scores then have the same bits whoever shares the batch (a GEMM of another size rounds in another
order), and attention that is dense over a batch, as in the ONNX function body, costs the sum of (length^2) rather than
(sum of lengths)^2. The split goes by the contract's tensor names: ``uih_*`` and ``candidate_*`` hold tokens of all
users end to end (flat ids: several entries per token), ``*_offsets`` say whose, ``contextual_*`` holds a row per user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import TAPS
from hstu_trt.contract.tensors import FUSED

ATTENTION_STAGES = ("hstu", FUSED, TAPS)
"""The stages of a ranking model whose feed says which token belongs to which user."""

TAP_PREFIX = "stu."
"""Outputs of this prefix hold all tokens in the split layout; any other output holds a row per candidate."""


def infer_per_user(
    run: Callable[[Mapping[str, NDArray]], Mapping[str, NDArray]],
    feed: Mapping[str, NDArray],
    slots: int,
    run_all: Callable[..., Iterable[Mapping[str, NDArray]]] = map,
) -> Tensors:
    """Runs a checked feed of an attention stage user by user.

    run: executes a feed. slots: contextual tokens per user. run_all: ``map``, or one that runs several at once.
    """
    if user_count(feed) == 1:
        return dict(run(feed))
    lengths = np.diff(feed["uih_offsets"]) + slots
    return join_users(list(run_all(run, one_user_feeds(feed))), lengths.tolist())


def user_count(feed: Mapping[str, NDArray]) -> int:
    """Number of users in a feed."""
    return len(feed["uih_offsets"]) - 1


def one_user_feeds(feed: Mapping[str, NDArray]) -> Iterator[Tensors]:
    """The feed of each user of a checked feed; the arrays are views."""
    for user in range(user_count(feed)):
        yield {name: _part(name, tensor, feed, user) for name, tensor in feed.items()}


def _part(name: str, tensor: NDArray, feed: Mapping[str, NDArray], user: int) -> NDArray:
    if name == "attention_norm":
        return tensor if len(tensor) == 1 else tensor[user : user + 1]
    group = name.partition("_")[0]
    if group == "contextual":
        return tensor[user : user + 1]
    first, last = (int(offset) for offset in feed[f"{group}_offsets"][user : user + 2])
    if name.endswith("_offsets"):
        return np.asarray([0, last - first], tensor.dtype)
    tokens = int(feed[f"{group}_offsets"][-1])
    per_token = len(tensor) // tokens if tokens else 1
    return tensor[first * per_token : last * per_token]


def join_users(outputs: Sequence[Mapping[str, NDArray]], prefix_lengths: Sequence[int]) -> Tensors:
    """The outputs of one-user runs as one batch would give them.

    prefix_lengths: contextual slots plus history length of each user, for the split layout
    ``[all prefixes | all candidates]``.
    """
    joined: Tensors = {}
    for name in outputs[0]:
        parts = [output[name] for output in outputs]
        if name.startswith(TAP_PREFIX):
            prefixes = [part[:length] for part, length in zip(parts, prefix_lengths, strict=True)]
            candidates = [part[length:] for part, length in zip(parts, prefix_lengths, strict=True)]
            parts = [*prefixes, *candidates]
        joined[name] = np.concatenate(parts)
    return joined
