"""Model configs: what a trained HSTU model is, as frozen, validated dataclasses.

Two families share one attention op:

* ``HstuConfig``: Meta's DlrmHSTU ranking model, as MLPerf DLRMv3 uses it.
* ``ResearchHstuConfig``: the sequential recommender of the HSTU paper, with relative attention bias.

``config_json.py`` reads and writes them, ``presets.py`` names some.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.field_checks import FieldError, is_finite, require, require_names, require_whole

TaskKind = Literal["binary", "regression"]
Postprocessor = Literal["l2_norm", "layer_norm", "timestamp"]
TimeBucketClamp = Literal["rows", "dim"]
TableDtype = Literal["float16", "float32"]

# The reference stores task kinds as the integers of its MultitaskTaskType enum.
TASK_KINDS: tuple[TaskKind, ...] = ("binary", "regression")

# The widest action mask: twice its highest bit still fits INT64, the dtype of actions.
MAX_ACTION_WEIGHT = 2**62 - 1


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One output of the multitask head."""

    name: str
    kind: TaskKind
    """``binary`` outputs pass a sigmoid, ``regression`` outputs are raw."""
    weight: int = 1
    """Bit mask of the training label; kept for the record, does not change a score."""

    def __post_init__(self) -> None:
        require(isinstance(self.name, str), f"the name of a task must be a text, got {self.name!r}")
        require(type(self.weight) is int, f"task {self.name!r}: its weight must be a whole number, got {self.weight!r}")


@dataclass(frozen=True, kw_only=True)
class ContextualFeature:
    """A per-user feature whose ids become the first tokens of the sequence."""

    name: str
    slots: int
    """Number of tokens; missing ids leave a zero vector, surplus ids are cut."""
    min_sequence: int = 0
    """The embeddings are zeroed for a user with fewer than this many history plus candidate tokens."""


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """An embedding table and the features that look up in it."""

    name: str
    rows: int
    dim: int
    dtype: TableDtype
    features: tuple[str, ...]

    def __post_init__(self) -> None:
        for what, value, least in (("rows", self.rows, 0), ("dim", self.dim, 1)):
            right = type(value) is int and value >= least
            require(right, f"table {self.name!r}: {what} must be a whole number >= {least}, got {value!r}")
        dtypes = get_args(TableDtype)
        require(self.dtype in dtypes, f"table {self.name!r}: dtype must be {' or '.join(dtypes)}, got {self.dtype!r}")


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Options of the attention op that are the same in every layer."""

    alpha: float | None = None
    """Factor on q.k; ``None`` means ``1/sqrt(qk_dim)``."""
    max_attn_len: int = 0
    """Window: a query sees keys at most this many positions back. 0 means no window."""
    contextual_seq_len: int = 0
    """Number of leading tokens with full attention. DlrmHSTU leaves it at 0 even with contextual tokens."""
    min_full_attn_seq_len: int = 0
    """The newest so many history tokens, and all candidates, are exempt from the window."""

    def __post_init__(self) -> None:
        require_whole(self, "max_attn_len", "contextual_seq_len", "min_full_attn_seq_len", least=0)
        if self.alpha is not None and not is_finite(self.alpha):
            raise FieldError("alpha", f"must be a finite number, got {self.alpha!r}")
        require(self.alpha != 0, "attn_alpha is 0: write null for the default, 1/sqrt(hstu_attn_qk_dim)")


@dataclass(frozen=True, kw_only=True)
class HstuConfig:
    """A DlrmHSTU ranking model. Field comments give the reference's name where it differs."""

    layers: int
    heads: int
    qk_dim: int
    """Width of q and k per head."""
    v_dim: int
    """Width of u and v per head."""
    embedding_dim: int
    """Width of every embedding table row (E)."""
    model_dim: int
    """Width of the token stream (D)."""
    preprocessor_dim: int
    """Hidden width of the preprocessor MLPs (P)."""
    group_norm: bool = False
    """Per-head output norm with scalar gain instead of a layer norm over all heads."""
    contextual_features: tuple[ContextualFeature, ...] = ()
    tasks: tuple[TaskConfig, ...]
    """Sorted: all binary tasks before all regression tasks."""
    user_embedding_features: tuple[str, ...]
    item_embedding_features: tuple[str, ...]
    """Candidate features concatenated for the item tower, in this order."""
    post_id_feature: str
    action_time_feature: str
    action_weight_feature: str | None = None
    query_time_feature: str
    feature_pairs: tuple[tuple[str, str], ...]
    """(history feature, candidate feature) pairs that form one merged sequence."""
    action_weights: tuple[int, ...] | None = None
    """Bit masks of the action types; ``None`` removes the action encoder."""
    postprocessor: Postprocessor = "timestamp"
    time_bucket_clamp: TimeBucketClamp = "rows"
    """Upper clamp of the time bucket: ``rows``, the last table row, as GPU-trained checkpoints need it, or ``dim``,
    ``model_dim - 1``, as the reference's CPU path has it."""
    attention: AttentionOptions = AttentionOptions()
    max_seq_len: int = 16384
    """Longest sequence served; the default of the fixed attention norm N."""
    max_candidates: int = 2048
    tables: tuple[TableConfig, ...] = ()
    """Empty until the weights are known: a reference config does not hold its tables."""

    action_dim: int = field(default=8, init=False)
    """Width per action type; hard-wired in the reference."""
    position_buckets: int = field(default=8192, init=False)
    """Rows of the position table; hard-wired in the reference."""
    time_buckets: int = field(default=2048, init=False)
    """Last time bucket; the table has one row more. Hard-wired in the reference."""
    tower_dim: int = field(default=512, init=False)
    """Hidden width of the item tower and the prediction head; hard-wired in the reference."""

    def __post_init__(self) -> None:
        require_whole(self, "layers", "heads", "qk_dim", "v_dim", "embedding_dim", "model_dim", "preprocessor_dim")
        require_whole(self, "max_seq_len", "max_candidates")
        require_names(self, "post_id_feature", "action_time_feature", "query_time_feature")
        if self.action_weight_feature is not None:
            require_names(self, "action_weight_feature")
        require(type(self.group_norm) is bool, f"hstu_group_norm must be true or false, got {self.group_norm!r}")
        self._check_time_buckets()
        self._check_actions()
        self._check_features()
        require(bool(self.tasks), "multitask_configs is empty: a ranking model needs at least one task")
        kinds = [TASK_KINDS.index(task.kind) for task in self.tasks]
        require(kinds == sorted(kinds), "multitask_configs must list binary tasks (0) before regression tasks (1)")

    def _check_time_buckets(self) -> None:
        clamps = get_args(TimeBucketClamp)
        require(
            self.time_bucket_clamp in clamps,
            f"time_bucket_clamp must be {' or '.join(map(repr, clamps))}, got {self.time_bucket_clamp!r}",
        )
        require(
            self.time_bucket_clamp == "rows" or self.model_dim <= self.time_buckets + 1,
            f"time_bucket_clamp 'dim' needs a model dim of at most {self.time_buckets + 1}, got {self.model_dim}",
        )

    def _check_actions(self) -> None:
        if self.action_weights is None:
            return
        require(bool(self.action_weights), "action_weights is empty: write null to leave the action encoder out")
        require(
            self.action_weight_feature is not None,
            "action_weights is set but uih_weight_feature_name is not: name the feature with the action bits",
        )
        for weight in self.action_weights:
            right = type(weight) is int and 0 < weight <= MAX_ACTION_WEIGHT
            require(right, f"action weight {weight!r} is no bit mask between 1 and 2^62 - 1")

    def _check_features(self) -> None:
        for slot in self.contextual_features:
            what = f"contextual feature {slot.name!r}"
            require(type(slot.slots) is int, f"{what}: its slots must be a whole number, got {slot.slots!r}")
            require(slot.slots > 0, f"{what} needs at least one slot, got {slot.slots}")
            right = type(slot.min_sequence) is int and slot.min_sequence >= 0
            require(right, f"{what}: its least sequence must be a whole number >= 0, got {slot.min_sequence!r}")
        slots = sum(slot.slots for slot in self.contextual_features)
        require(slots <= self.max_seq_len, f"{slots} contextual slots do not fit max_seq_len, {self.max_seq_len}")
        require(
            self.post_id_feature in self.uih_partner,
            f"merge_uih_candidate_feature_mapping has no pair for the post id feature {self.post_id_feature!r}",
        )
        for feature in self.embedding_features:
            known = feature in self.user_embedding_features or feature in self.item_embedding_features
            require(known, f"feature {feature!r} is looked up but is in neither embedding feature list")

    @property
    def uih_partner(self) -> dict[str, str]:
        """History feature -> candidate feature of the merged sequence."""
        return dict(self.feature_pairs)

    @property
    def additional_features(self) -> tuple[str, ...]:
        """History features added to the content embedding: both sides embedded, and not the post id."""
        return tuple(
            uih
            for uih, candidate in self.feature_pairs
            if uih in self.user_embedding_features
            and candidate in self.item_embedding_features
            and uih != self.post_id_feature
        )

    @property
    def uih_features(self) -> tuple[str, ...]:
        """Columns of ``uih_ids`` and of ``uih_embeddings``: the post id, then the additional features."""
        return (self.post_id_feature, *self.additional_features)

    @property
    def candidate_features(self) -> tuple[str, ...]:
        """Columns of ``candidate_ids``: the item tower's features, then partners of history features not among them."""
        partners = tuple(self.uih_partner[name] for name in self.uih_features)
        extra = tuple(name for name in partners if name not in self.item_embedding_features)
        return (*self.item_embedding_features, *extra)

    @property
    def contextual_slots(self) -> tuple[str, ...]:
        """Columns of ``contextual_ids``: each contextual feature, once per slot."""
        return tuple(f.name for f in self.contextual_features for _ in range(f.slots))

    @property
    def embedding_features(self) -> tuple[str, ...]:
        """Every feature that is looked up in a table, without duplicates."""
        return tuple(dict.fromkeys((*self.uih_features, *self.candidate_features, *self.contextual_slots)))

    @property
    def alpha(self) -> float:
        """Factor on q.k."""
        return self.attention.alpha if self.attention.alpha is not None else 1.0 / math.sqrt(self.qk_dim)

    def table_of(self, feature: str) -> TableConfig:
        """The table that a feature looks up in."""
        for table in self.tables:
            if feature in table.features:
                return table
        raise ConfigError(f"no embedding table for feature {feature!r}; tables: {[t.name for t in self.tables]}")


@dataclass(frozen=True, kw_only=True)
class ResearchHstuConfig:
    """The sequential recommender of the HSTU paper: relative bias, SiLU on u, v, q and k, norms without affine."""

    layers: int
    heads: int
    qk_dim: int
    v_dim: int
    model_dim: int
    max_seq_len: int
    """``max_sequence_len + max_output_len``: rows of the position table and the constant N."""
    concat_ua: bool = False
    """Project ``[u, a, u*a]`` instead of ``u*a``."""
    postprocessor: Literal["l2_norm", "layer_norm"] = "l2_norm"
    eps: float = 1e-6
    time_buckets: int = field(default=128, init=False)
    """Last time bucket; the table has one row more. Hard-wired in the reference."""

    def __post_init__(self) -> None:
        require_whole(self, "layers", "heads", "qk_dim", "v_dim", "model_dim", "max_seq_len")
        require(type(self.concat_ua) is bool, f"concat_ua must be true or false, got {self.concat_ua!r}")
        require(is_finite(self.eps) and self.eps > 0, f"eps must be a finite number > 0, got {self.eps!r}")


AnyConfig = HstuConfig | ResearchHstuConfig
