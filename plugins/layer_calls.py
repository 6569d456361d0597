"""What the layer kernels take as tensors. Shape suffixes: T tokens, B users, D model width, W width of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Postprocessor = Literal["l2_norm", "layer_norm", "timestamp"]
POSTPROCESSORS: tuple[Postprocessor, ...] = ("l2_norm", "layer_norm", "timestamp")
"""Kinds as ``Postprocessor`` of kernels/layer/params.h numbers them."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A layer norm: fp32 gain and bias [W], or [heads] of a group norm."""

    gain: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows [n + 1, D] that tokens choose by ``index`` int64 [T]; outside of [0, n) the last one. None: row by row."""

    rows: Tensor
    index: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Weights of the token stream. Tables have the dtype of the activations."""

    content_norm: Norm
    actions_table: Tensor | None
    """[2^masks + 1, D]: what each set of actions adds; the last row is the candidates'."""
    action_masks: tuple[int, ...]
    position_table: Tensor
    """[positions, D]; farther tokens take the last row."""
    time_table: Tensor
    """[buckets, D], likewise."""
    slots: int
    """Contextual tokens per user."""


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """The tokens of a batch in the split layout: all prefixes (contextual, then history), then all candidates."""

    content: Tensor
    """[T, D]: content product before its norm; not read for contextual tokens."""
    extra: Rows | None
    actions: Tensor | None
    """int64 [T] bit masks; not read for candidates and contextual tokens."""
    contextual: Tensor | None
    """[B * slots, D]"""
    timestamps: Tensor
    """int64 [T] seconds, of contextual tokens 0."""
    prefix_offsets: Tensor
    """INT32 [B+1]"""
    candidate_offsets: Tensor
    """INT32 [B+1]"""
    prefix_tokens: int
    """Sum of the prefixes: the first candidate's row."""


@dataclass(frozen=True, kw_only=True)
class VectorWeights:
    """Weights of the postprocessor."""

    kind: Postprocessor
    norm: Norm | None
    """None for ``l2_norm``."""
    time_weight: Tensor | None
    """fp32 [4, D]: of the cos and sin of hour and day."""
