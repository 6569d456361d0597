"""Tensor specs: names, dtypes and symbolic dims of every stage that rooms hand to each other.

The stages of a ranking model, in the order of a request:

    embedding_lookup   ids -> table rows, features side by side
    hstu               rows, timestamps, actions -> one user vector per candidate
    mlp_head           user vectors, candidate rows -> scores
    ranking            the ensemble of the three: ids -> scores, explicit jagged tensors
    ranking_fused      one graph: ids -> scores, 1-D ragged ids

Tokens are packed (jagged): ``values [sum of lengths]`` with INT32 ``offsets [users + 1]``, no padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import HstuConfig, ResearchHstuConfig

Precision = Literal["fp32", "fp16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "fp8")

STAGES = ("embedding_lookup", "hstu", "mlp_head")
ENSEMBLE = "ranking"
FUSED = "ranking_fused"
RESEARCH_STAGE = "sequence_encoder"

MOST_TOKENS = 2**31 - 1
"""Of a batch: what INT32 offsets can say."""

# Contextual slots without an id hold this; the lookup answers a zero row.
PADDING_ID = -1


@dataclass(frozen=True)
class Dim:
    """A symbolic dimension with the bounds of its optimisation profile."""

    name: str
    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 0 <= self.min <= self.opt <= self.max:
            raise ConfigError(f"dim {self.name}: needs 0 <= min <= opt <= max, got {self.min}, {self.opt}, {self.max}")


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor at a seam. ``dtype`` is numpy's name of it."""

    name: str
    dtype: str
    dims: tuple[Dim | int, ...]

    @property
    def shape_text(self) -> str:
        """The shape for messages, as in ``[uih_tokens, 2]``."""
        return "[" + ", ".join(d.name if isinstance(d, Dim) else str(d) for d in self.dims) + "]"


@dataclass(frozen=True)
class StageSpec:
    """The inputs and outputs of one stage."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def tensor(self, name: str) -> TensorSpec:
        """The spec of a tensor by name."""
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise KeyError(name)

    def without(self, *names: str) -> StageSpec:
        """The same stage without some inputs, e.g. those that a deployment fixes."""
        return dataclasses.replace(self, inputs=tuple(spec for spec in self.inputs if spec.name not in names))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest request that a deployment accepts; upper bounds of the optimisation profiles."""

    users: int
    """Users per request."""
    history: int
    """History events per user."""
    candidates: int
    """Candidates per user."""
    batch_history: int
    """History events per batch, over all users."""
    batch_candidates: int
    """Candidates per batch, over all users."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if type(value) is not int:
                raise ConfigError(f"limit {name} must be a whole number, got {value!r}")
            if value < 1:
                raise ConfigError(f"limit {name} must be >= 1, got {value}")
            if value > MOST_TOKENS:
                raise ConfigError(f"limit {name} must fit INT32, as offsets do: at most {MOST_TOKENS}, got {value}")
        for one, batch in ((self.history, self.batch_history), (self.candidates, self.batch_candidates)):
            if batch < one:
                raise ConfigError(f"the limit of a batch ({batch}) is below that of one user ({one})")


def default_limits(config: HstuConfig, **overrides: int | None) -> Limits:
    """Limits from the config: history fills what ``max_seq_len`` leaves beside candidates and contextual tokens.

    A config whose ``max_candidates`` alone exceeds ``max_seq_len`` (test models) gets ``max_seq_len`` for the history.
    ``overrides`` replace single limits; ``None`` means the default.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    users = given.pop("users", 32)
    rest = config.max_seq_len - config.max_candidates - len(config.contextual_slots)
    history = given.pop("history", rest if rest > 0 else config.max_seq_len)
    candidates = given.pop("candidates", config.max_candidates)
    return Limits(
        users=users,
        history=history,
        candidates=candidates,
        batch_history=given.pop("batch_history", max(history, min(users * history, 65_536))),
        batch_candidates=given.pop("batch_candidates", max(candidates, min(users * candidates, 16_384))),
        **given,
    )


def float_dtype(precision: Precision) -> str:
    """The dtype of activations at the seams of a precision; fp8 stays inside the stages."""
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}: choose from {', '.join(PRECISIONS)}")
    return {"fp32": "float32", "fp16": "float16", "fp8": "float16"}[precision]


def stage_specs(config: HstuConfig, limits: Limits, precision: Precision) -> dict[str, StageSpec]:
    """The specs of the three stages, the ensemble and the fused model, by name."""
    parts = _Tensors(config, limits, float_dtype(precision))
    ids, rows = parts.ids(), parts.rows()
    offsets, payload, norm = parts.offsets(), parts.payload(), parts.norm()
    scores, user_vectors = parts.scores(), parts.user_vectors()
    candidate_rows = tuple(spec for spec in rows if spec.name == "candidate_embeddings")
    stages = (
        StageSpec("embedding_lookup", ids, rows),
        StageSpec("hstu", (*rows, *payload, *offsets, norm), (user_vectors,)),
        StageSpec("mlp_head", (user_vectors, *candidate_rows), (scores,)),
        StageSpec(ENSEMBLE, (*ids, *payload, *offsets), (scores,)),
        StageSpec(FUSED, (*parts.ids(flat=True), *payload, *offsets, norm), (scores,)),
    )
    return {stage.name: stage for stage in stages}


def research_specs(config: ResearchHstuConfig, limits: Limits) -> dict[str, StageSpec]:
    """The spec of the research family's one stage: ids and timestamps in, encoded tokens out (fp32)."""
    users = _users(limits)
    tokens = Dim("uih_tokens", 1, min(1024, limits.batch_history), limits.batch_history)
    stage = StageSpec(
        RESEARCH_STAGE,
        (
            TensorSpec("uih_ids", "int64", (tokens,)),
            TensorSpec("uih_timestamps", "int64", (tokens,)),
            TensorSpec("next_timestamps", "int64", (tokens,)),
            TensorSpec("uih_offsets", "int32", (_plus_one(users),)),
        ),
        (
            TensorSpec("encoded", "float32", (tokens, config.model_dim)),
            TensorSpec("user_embeddings", "float32", (users, config.model_dim)),
        ),
    )
    return {stage.name: stage}


def _users(limits: Limits) -> Dim:
    return Dim("users", 1, min(8, limits.users), limits.users)


def _plus_one(users: Dim) -> Dim:
    return Dim("users_plus_1", users.min + 1, users.opt + 1, users.max + 1)


class _Tensors:
    """The tensors of a ranking model, each written once."""

    def __init__(self, config: HstuConfig, limits: Limits, dtype: str) -> None:
        self.config = config
        self.dtype = dtype
        self.users = _users(limits)
        self.history = Dim("uih_tokens", 0, limits.history, limits.batch_history)
        self.candidates = Dim("candidates", 1, limits.candidates, limits.batch_candidates)

    def ids(self, flat: bool = False) -> tuple[TensorSpec, ...]:
        """Ids, one column per feature; ``flat`` rows are laid end to end, as Triton's ragged batching wants them."""
        groups = self._groups()
        if flat:
            groups = {name: (_times(rows, width), 1) for name, (rows, width) in groups.items()}
        return tuple(
            TensorSpec(f"{name}_ids", "int64", (rows,) if flat and name != "contextual" else (rows, width))
            for name, (rows, width) in (groups | self._contextual_group()).items()
        )

    def rows(self) -> tuple[TensorSpec, ...]:
        """Table rows, the features of a token side by side."""
        dim = self.config.embedding_dim
        return tuple(
            TensorSpec(f"{name}_embeddings", self.dtype, (rows, width * dim))
            for name, (rows, width) in (self._groups() | self._contextual_group()).items()
        )

    def _groups(self) -> dict[str, tuple[Dim, int]]:
        return {
            "uih": (self.history, len(self.config.uih_features)),
            "candidate": (self.candidates, len(self.config.candidate_features)),
        }

    def _contextual_group(self) -> dict[str, tuple[Dim, int]]:
        slots = len(self.config.contextual_slots)
        return {"contextual": (self.users, slots)} if slots else {}

    def payload(self) -> tuple[TensorSpec, ...]:
        """Per-token integers that no table holds: timestamps in seconds, and action bit masks."""
        actions = (TensorSpec("uih_actions", "int64", (self.history,)),) if self.config.action_weights else ()
        return (
            TensorSpec("uih_timestamps", "int64", (self.history,)),
            *actions,
            TensorSpec("candidate_timestamps", "int64", (self.candidates,)),
        )

    def offsets(self) -> tuple[TensorSpec, ...]:
        plus_one = _plus_one(self.users)
        return (
            TensorSpec("uih_offsets", "int32", (plus_one,)),
            TensorSpec("candidate_offsets", "int32", (plus_one,)),
        )

    def norm(self) -> TensorSpec:
        """N of the attention's 1/N: one for all users, or one per user."""
        return TensorSpec("attention_norm", "float32", (Dim("norms", 1, 1, self.users.max),))

    def user_vectors(self) -> TensorSpec:
        return TensorSpec("user_embeddings", self.dtype, (self.candidates, self.config.model_dim))

    def scores(self) -> TensorSpec:
        return TensorSpec("preds", "float32", (self.candidates, len(self.config.tasks)))


def _times(dim: Dim, factor: int) -> Dim:
    name = dim.name if factor == 1 else f"{dim.name}_x_{factor}"
    return Dim(name, dim.min * factor, dim.opt * factor, dim.max * factor)


def feature_columns(config: HstuConfig) -> Mapping[str, tuple[str, ...]]:
    """Ids tensor -> the feature of each of its columns."""
    columns = {"uih_ids": config.uih_features, "candidate_ids": config.candidate_features}
    if config.contextual_slots:
        columns["contextual_ids"] = config.contextual_slots
    return columns
