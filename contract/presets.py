"""Presets: functions that return a config, one derived from another where they are alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from hstu_trt.contract.model import ContextualFeature, HstuConfig, TableConfig, TaskConfig


def debug() -> HstuConfig:
    """A model small enough to score hundreds of requests per second on two CPU cores."""
    tables = {"item_id": (20_000, 64), "item_category_id": (16, 64), "user_id": (2_000, 64)}
    return dataclasses.replace(
        dlrm_v3(),
        layers=2,
        heads=2,
        qk_dim=32,
        v_dim=32,
        embedding_dim=64,
        model_dim=64,
        preprocessor_dim=32,
        max_seq_len=512,
        max_candidates=64,
        tables=_streaming_tables(tables),
    )


def dlrm_v3() -> HstuConfig:
    """MLPerf Inference DLRMv3: dataset "streaming-100b" of the reference (5 layers, width 512, 4 heads of 128)."""
    tables = {"item_id": (1_000_000_000, 512), "item_category_id": (128, 512), "user_id": (10_000_000, 512)}
    return HstuConfig(
        layers=5,
        heads=4,
        qk_dim=128,
        v_dim=128,
        embedding_dim=512,
        model_dim=512,
        preprocessor_dim=256,
        contextual_features=(ContextualFeature(name="user_id", slots=1, min_sequence=20),),
        tasks=(TaskConfig(name="rating", kind="binary"),),
        user_embedding_features=("item_id", "user_id", "item_category_id"),
        item_embedding_features=("item_candidate_id", "item_candidate_category_id"),
        post_id_feature="item_id",
        action_time_feature="action_timestamp",
        action_weight_feature="item_weights",
        query_time_feature="item_query_time",
        feature_pairs=(
            ("item_id", "item_candidate_id"),
            ("item_rating", "item_candidate_rating"),
            ("action_timestamp", "item_query_time"),
            ("item_weights", "item_action_weights"),
            ("dummy_watch_time", "item_dummy_watchtime"),
            ("item_category_id", "item_candidate_category_id"),
        ),
        action_weights=(1, 2, 4, 8, 16),
        tables=_streaming_tables(tables),
    )


def _streaming_tables(shapes: Mapping[str, tuple[int, int]]) -> tuple[TableConfig, ...]:
    features = {
        "item_id": ("item_id", "item_candidate_id"),
        "item_category_id": ("item_category_id", "item_candidate_category_id"),
        "user_id": ("user_id",),
    }
    return tuple(
        TableConfig(name=name, rows=rows, dim=dim, dtype="float16", features=features[name])
        for name, (rows, dim) in shapes.items()
    )


PRESETS = {"debug": debug, "dlrm_v3": dlrm_v3}
