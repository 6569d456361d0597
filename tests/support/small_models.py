"""A config and limits so small that a model of them is quick to write."""

import dataclasses

from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import Limits

LIMITS = Limits(users=4, history=16, candidates=6, batch_history=24, batch_candidates=12)


def small_config(*, contextual: bool = True, actions: bool = True):
    config = debug()
    return dataclasses.replace(
        config,
        embedding_dim=4,
        contextual_features=config.contextual_features if contextual else (),
        action_weights=config.action_weights if actions else None,
        tables=tuple(dataclasses.replace(table, rows=9, dim=4) for table in config.tables),
    )
