"""Configs as JSON: the reference's own ``DlrmHSTUConfig`` fields, and back.

Keys that begin with ``_`` are comments. A few keys are ours, since the reference keeps these facts in code:
``embedding_tables``, ``time_bucket_clamp``, ``attn_alpha``, ``max_attn_len``, ``stu_contextual_seq_len`` and
``min_full_attn_seq_len``.
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.field_checks import FieldError
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

# The same of the research family, whose ``max_output_len`` is added to ``max_seq_len``.
_RESEARCH_KEYS = {
    "max_sequence_len": "max_seq_len",
    "embedding_dim": "model_dim",
    "num_blocks": "layers",
    "num_heads": "heads",
    "linear_dim": "v_dim",
    "attention_dim": "qk_dim",
    "concat_ua": "concat_ua",
    "eps": "eps",
}

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
    """Reads a config of either family. Raises ConfigError that names the key that is unknown, missing or wrong."""
    if not isinstance(document, Mapping):
        raise ConfigError(f"expected a JSON object, got {type(document).__name__}")
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
    except OSError as error:
        raise ConfigError(f"config {source} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config {source}: not valid JSON ({error})") from None
    try:
        return config_from_json(document)
    except ConfigError as error:
        raise ConfigError(f"config {source}: {error}") from None


def _dlrm_from_json(keys: dict[str, Any]) -> HstuConfig:
    _refuse_unknown(keys, {*_PLAIN_KEYS, *_ATTENTION_KEYS, *_OTHER_KEYS, *_TRAINING_KEYS})
    with _by_their_keys({**_PLAIN_KEYS, **_ATTENTION_KEYS}):
        minimum = _mapping(keys, "contextual_feature_to_min_uih_length")
        weights = keys.get("action_weights")
        return HstuConfig(
            **_plain_fields(keys, _PLAIN_KEYS, HstuConfig),
            attention=AttentionOptions(**_plain_fields(keys, _ATTENTION_KEYS, AttentionOptions)),
            contextual_features=tuple(
                ContextualFeature(name=name, slots=slots, min_sequence=minimum.get(name, 0))
                for name, slots in _mapping(keys, "contextual_feature_to_max_length").items()
            ),
            tasks=tuple(_task_from_json(task) for task in _list("multitask_configs", keys["multitask_configs"])),
            user_embedding_features=_names("user_embedding_feature_names", keys["user_embedding_feature_names"]),
            item_embedding_features=_names("item_embedding_feature_names", keys["item_embedding_feature_names"]),
            action_weight_feature=keys.get("uih_weight_feature_name") or None,
            feature_pairs=_pairs("merge_uih_candidate_feature_mapping", keys["merge_uih_candidate_feature_mapping"]),
            action_weights=None if weights is None else tuple(_list("action_weights", weights)),
            postprocessor=_postprocessor_from_json(keys),
            tables=tuple(_table_from_json(name, table) for name, table in _mapping(keys, "embedding_tables").items()),
        )


def _task_from_json(task: Any) -> TaskConfig:
    kind = _object("multitask_configs: a task", task)["task_type"]
    if type(kind) is not int or kind not in (0, 1):
        raise ConfigError(f"task {task['task_name']!r}: task_type must be 0 (binary) or 1 (regression), got {kind!r}")
    return TaskConfig(name=task["task_name"], kind=TASK_KINDS[kind], weight=task.get("task_weight", 1))


def _postprocessor_from_json(keys: Mapping[str, Any]) -> Postprocessor:
    if not _flag(keys, "enable_postprocessor", default=True):
        return "l2_norm"
    return "layer_norm" if _flag(keys, "use_layer_norm_postprocessor", default=False) else "timestamp"


def _table_from_json(name: str, table: Any) -> TableConfig:
    what = f"embedding_tables: table {name!r}"
    t = _object(what, table)
    rows, dim, dtype, features = (t[key] for key in ("rows", "dim", "dtype", "features"))
    return TableConfig(name=name, rows=rows, dim=dim, dtype=dtype, features=_names(f"{what}: features", features))


def _research_from_json(keys: dict[str, Any]) -> ResearchHstuConfig:
    _refuse_unknown(keys, {*_RESEARCH_KEYS, "max_output_len", "linear_activation", "postproc"})
    if keys.get("linear_activation", "silu") != "silu":
        raise ConfigError(f"linear_activation must be 'silu', got {keys['linear_activation']!r}")
    if keys.get("postproc", "l2") not in ("l2", "ln"):
        raise ConfigError(f"postproc must be 'l2' or 'ln', got {keys['postproc']!r}")
    output_length = keys.get("max_output_len", 0)
    if type(output_length) is not int or output_length < 0:
        raise ConfigError(f"max_output_len must be a whole number >= 0, got {_shown(output_length)}")
    with _by_their_keys(_RESEARCH_KEYS):
        config = ResearchHstuConfig(
            **_plain_fields(keys, _RESEARCH_KEYS, ResearchHstuConfig),
            postprocessor="l2_norm" if keys.get("postproc", "l2") == "l2" else "layer_norm",
        )
        return dataclasses.replace(config, max_seq_len=config.max_seq_len + output_length)


@contextmanager
def _by_their_keys(fields: Mapping[str, str]) -> Iterator[None]:
    """Names fields that a config refuses by the keys of the document, and keys that it lacks. Raises ConfigError."""
    try:
        yield
    except FieldError as error:
        keys = {field: key for key, field in fields.items()}
        raise ConfigError(f"{keys.get(error.field, error.field)} {error.problem}") from None
    except KeyError as error:
        raise ConfigError(f"missing key {error.args[0]!r}") from None


def _plain_fields(keys: Mapping[str, Any], fields: Mapping[str, str], config: type) -> dict[str, Any]:
    """Fields whose values are taken over as they are; null means the default. Raises KeyError for one without any."""
    required = {f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING}
    return {field: keys[key] for key, field in fields.items() if keys.get(key) is not None or field in required}


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _object(what: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} must be a JSON object, got {_shown(value)}")
    return value


def _mapping(keys: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return _object(key, keys.get(key) or {})


def _list(what: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{what} must be a list, got {_shown(value)}")
    return value


def _names(what: str, value: Any) -> tuple[str, ...]:
    if not all(isinstance(name, str) for name in _list(what, value)):
        raise ConfigError(f"{what} must be a list of names, got {_shown(value)}")
    return tuple(value)


def _pairs(what: str, value: Any) -> tuple[tuple[str, str], ...]:
    pairs = [_names(f"{what}: a pair", pair) for pair in _list(what, value)]
    for pair in pairs:
        if len(pair) != 2:
            raise ConfigError(f"{what}: a pair is a history feature and a candidate feature, got {_shown(list(pair))}")
    return tuple((history, candidate) for history, candidate in pairs)


def _flag(keys: Mapping[str, Any], key: str, *, default: bool) -> bool:
    value = keys.get(key, default)
    if type(value) is not bool:
        raise ConfigError(f"{key} must be true or false, got {_shown(value)}")
    return value


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
        **{key: getattr(config, field) for key, field in _RESEARCH_KEYS.items()},
        "max_output_len": 0,
        "linear_activation": "silu",
        "postproc": "l2" if config.postprocessor == "l2_norm" else "ln",
    }
