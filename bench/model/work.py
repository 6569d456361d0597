"""Floating-point operations of a forward: causal attention, candidates alone in the last layer."""

from __future__ import annotations

from hstu_trt.contract.model import HstuConfig


def request_flops(config: HstuConfig, history: int, candidates: int) -> int:
    """Operations (2 per multiply-add) of one request."""
    prefix = history + len(config.contextual_slots)
    tokens, last = prefix + candidates, config.layers - 1
    pairs = prefix * (prefix + 1) // 2
    over_prefix = candidates * (prefix + 1)
    attention = 2 * config.heads * (config.qk_dim + config.v_dim) * (last * (pairs + over_prefix) + over_prefix)
    return attention + _products(config, tokens, candidates)


def _products(config: HstuConfig, tokens: int, candidates: int) -> int:
    d, p, e, t = config.model_dim, config.preprocessor_dim, config.embedding_dim, config.tower_dim
    v, qk = config.heads * config.v_dim, config.heads * config.qk_dim
    last = config.layers - 1
    layers = last * tokens * (d * 2 * (v + qk) + 3 * v * d)
    layers += tokens * d * (v + qk) + candidates * (d * (v + qk) + 3 * v * d)
    content = tokens * (e * p + p * d)
    tower = candidates * (len(config.item_embedding_features) * e * t + t * d)
    head = candidates * (d * t + t * len(config.tasks))
    combiner = candidates * d * d if config.postprocessor == "timestamp" else 0
    return 2 * (layers + content + tower + head + combiner)
