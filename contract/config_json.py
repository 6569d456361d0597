"""Configs as JSON: the reference's own ``DlrmHSTUConfig`` fields, and back.

Keys that begin with ``_`` are comments. A few keys are ours, since the reference keeps these facts in code:
``embedding_tables``, ``time_bucket_clamp``, ``attn_alpha``, ``max_attn_len``, ``stu_contextual_seq_len`` and
``min_full_attn_seq_len``.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.manifest import read_json
from hstu_trt.contract.model import (
    TASK_KINDS,
    AnyConfig,
    AttentionOptions,
    ContextualFeature,
    HstuConfig,
    Postprocessor,
    ResearchHstuConfig,
    TableConfig,
    TaskConfig,
)
from hstu_trt.contract.presets import PRESETS

# Reference keys that steer training or auto-tuning only; they do not change a score.
_TRAINING_KEYS = frozenset(
    {
        "hstu_input_dropout_ratio",
        "hstu_linear_dropout_rate",
        "causal_multitask_weights",
        "action_embedding_init_std",
        "max_num_candidates",
        "candidates_weight_feature_name",
        "candidates_watchtime_feature_name",
        "hstu_uih_feature_names",
        "hstu_candidate_feature_names",
    }
)

# Reference key -> field of HstuConfig, where the value is taken over as it is.
_PLAIN_KEYS = {
    "hstu_num_heads": "heads",
    "hstu_attn_linear_dim": "v_dim",
    "hstu_attn_qk_dim": "qk_dim",
    "hstu_attn_num_layers": "layers",
    "hstu_embedding_table_dim": "embedding_dim",
    "hstu_preprocessor_hidden_dim": "preprocessor_dim",
    "hstu_transducer_embedding_dim": "model_dim",
    "hstu_group_norm": "group_norm",
    "max_seq_len": "max_seq_len",
    "max_num_candidates_inference": "max_candidates",
    "candidates_querytime_feature_name": "query_time_feature",
    "uih_post_id_feature_name": "post_id_feature",
    "uih_action_time_feature_name": "action_time_feature",
    "time_bucket_clamp": "time_bucket_clamp",
}

_REQUIRED_FIELDS = {f.name for f in dataclasses.fields(HstuConfig) if f.default is dataclasses.MISSING}

_ATTENTION_KEYS = {
    "attn_alpha": "alpha",
    "max_attn_len": "max_attn_len",
    "stu_contextual_seq_len": "contextual_seq_len",
    "min_full_attn_seq_len": "min_full_attn_seq_len",
}

_OTHER_KEYS = frozenset(
    {
        "contextual_feature_to_max_length",
        "contextual_feature_to_min_uih_length",
        "multitask_configs",
        "user_embedding_feature_names",
        "item_embedding_feature_names",
        "uih_weight_feature_name",
        "merge_uih_candidate_feature_mapping",
        "action_weights",
        "enable_postprocessor",
        "use_layer_norm_postprocessor",
        "embedding_tables",
    }
)


def config_from_json(document: Mapping[str, Any]) -> AnyConfig:
    """Reads a config of either family. Raises ConfigError on unknown, missing or contradictory keys."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"a config is a JSON object, not {type(document).__name__}")
    keys = {key: value for key, value in document.items() if not key.startswith("_")}
    if "num_blocks" in keys:
        return _research_from_json(keys)
    return _dlrm_from_json(keys)


def load_config(source: str | Path) -> AnyConfig:
    """Reads a config from a preset's name or a JSON file."""
    if str(source) in PRESETS:
        return PRESETS[str(source)]()
    path = Path(source)
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise ConfigError(f"config {source}: no such file, and not a preset ({', '.join(PRESETS)})") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"config {source}: not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise ConfigError(f"config {source}: expected a JSON object, got {type(document).__name__}")
    try:
        return config_from_json(document)
    except ConfigError as error:
        raise ConfigError(f"config {source}: {error}") from None


def _dlrm_from_json(keys: dict[str, Any]) -> HstuConfig:
    known = {*_PLAIN_KEYS, *_ATTENTION_KEYS, *_OTHER_KEYS, *_TRAINING_KEYS}
    _refuse_unknown(keys, known)
    try:
        plain = {name: keys[key] for key, name in _PLAIN_KEYS.items() if keys.get(key) is not None}
        options = {name: keys[key] for key, name in _ATTENTION_KEYS.items() if keys.get(key) is not None}
        slots = keys.get("contextual_feature_to_max_length") or {}
        minimum = keys.get("contextual_feature_to_min_uih_length") or {}
        weights = keys.get("action_weights")
        for key, name in _PLAIN_KEYS.items():
            if name not in plain and name in _REQUIRED_FIELDS:
                raise ConfigError(f"missing key {key!r}")
        return HstuConfig(
            **plain,
            attention=AttentionOptions(**options),
            contextual_features=tuple(
                ContextualFeature(name=name, slots=int(count), min_sequence=int(minimum.get(name, 0)))
                for name, count in slots.items()
            ),
            tasks=tuple(_task_from_json(task) for task in keys["multitask_configs"]),
            user_embedding_features=tuple(keys["user_embedding_feature_names"]),
            item_embedding_features=tuple(keys["item_embedding_feature_names"]),
            action_weight_feature=keys.get("uih_weight_feature_name") or None,
            feature_pairs=tuple((str(u), str(c)) for u, c in keys["merge_uih_candidate_feature_mapping"]),
            action_weights=None if weights is None else tuple(int(w) for w in weights),
            postprocessor=_postprocessor_from_json(keys),
            tables=_tables_from_json(keys.get("embedding_tables") or {}),
        )
    except KeyError as error:
        raise ConfigError(f"missing key {error.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError(f"malformed value: {error}") from None


def _task_from_json(task: Mapping[str, Any]) -> TaskConfig:
    kind = task["task_type"]
    if kind not in (0, 1):
        raise ConfigError(f"task {task['task_name']!r}: task_type must be 0 (binary) or 1 (regression), got {kind!r}")
    return TaskConfig(name=task["task_name"], kind=TASK_KINDS[kind], weight=int(task.get("task_weight", 1)))


def _postprocessor_from_json(keys: Mapping[str, Any]) -> Postprocessor:
    if not keys.get("enable_postprocessor", True):
        return "l2_norm"
    return "layer_norm" if keys.get("use_layer_norm_postprocessor", False) else "timestamp"


def _tables_from_json(tables: Mapping[str, Mapping[str, Any]]) -> tuple[TableConfig, ...]:
    return tuple(
        TableConfig(name=name, rows=int(t["rows"]), dim=int(t["dim"]), dtype=t["dtype"], features=tuple(t["features"]))
        for name, t in tables.items()
    )


def _research_from_json(keys: dict[str, Any]) -> ResearchHstuConfig:
    known = {
        "max_sequence_len", "max_output_len", "embedding_dim", "num_blocks", "num_heads", "linear_dim",
        "attention_dim", "concat_ua", "linear_activation", "postproc", "eps",
    }  # fmt: skip
    _refuse_unknown(keys, known)
    if keys.get("linear_activation", "silu") != "silu":
        raise ConfigError(f"linear_activation must be 'silu', got {keys['linear_activation']!r}")
    if keys.get("postproc", "l2") not in ("l2", "ln"):
        raise ConfigError(f"postproc must be 'l2' or 'ln', got {keys['postproc']!r}")
    try:
        return ResearchHstuConfig(
            layers=keys["num_blocks"],
            heads=keys["num_heads"],
            qk_dim=keys["attention_dim"],
            v_dim=keys["linear_dim"],
            model_dim=keys["embedding_dim"],
            max_seq_len=keys["max_sequence_len"] + keys.get("max_output_len", 0),
            concat_ua=bool(keys.get("concat_ua", False)),
            postprocessor="l2_norm" if keys.get("postproc", "l2") == "l2" else "layer_norm",
            eps=float(keys.get("eps", 1e-6)),
        )
    except KeyError as error:
        raise ConfigError(f"missing key {error.args[0]!r}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"malformed value: {error}") from None


def _refuse_unknown(keys: Iterable[str], known: set[str]) -> None:
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "; start a key with '_' to keep it as a comment"
            raise ConfigError(f"unknown key {key!r}{hint}")


def config_to_json(config: AnyConfig) -> dict[str, Any]:
    """The config as a JSON object that ``config_from_json`` reads back to an equal config."""
    return _dlrm_to_json(config) if isinstance(config, HstuConfig) else _research_to_json(config)


def _dlrm_to_json(config: HstuConfig) -> dict[str, Any]:
    plain = {key: getattr(config, name) for key, name in _PLAIN_KEYS.items()}
    options = {key: getattr(config.attention, name) for key, name in _ATTENTION_KEYS.items()}
    return {
        **plain,
        **options,
        "contextual_feature_to_max_length": {f.name: f.slots for f in config.contextual_features},
        "contextual_feature_to_min_uih_length": {f.name: f.min_sequence for f in config.contextual_features},
        "multitask_configs": [
            {"task_name": t.name, "task_weight": t.weight, "task_type": TASK_KINDS.index(t.kind)} for t in config.tasks
        ],
        "user_embedding_feature_names": list(config.user_embedding_features),
        "item_embedding_feature_names": list(config.item_embedding_features),
        "uih_weight_feature_name": config.action_weight_feature,
        "merge_uih_candidate_feature_mapping": [list(pair) for pair in config.feature_pairs],
        "action_weights": None if config.action_weights is None else list(config.action_weights),
        "enable_postprocessor": config.postprocessor != "l2_norm",
        "use_layer_norm_postprocessor": config.postprocessor == "layer_norm",
        "embedding_tables": {
            t.name: {"rows": t.rows, "dim": t.dim, "dtype": t.dtype, "features": list(t.features)}
            for t in config.tables
        },
    }


def _research_to_json(config: ResearchHstuConfig) -> dict[str, Any]:
    return {
        "max_sequence_len": config.max_seq_len,
        "max_output_len": 0,
        "embedding_dim": config.model_dim,
        "num_blocks": config.layers,
        "num_heads": config.heads,
        "linear_dim": config.v_dim,
        "attention_dim": config.qk_dim,
        "concat_ua": config.concat_ua,
        "linear_activation": "silu",
        "postproc": "l2" if config.postprocessor == "l2_norm" else "ln",
        "eps": config.eps,
    }
