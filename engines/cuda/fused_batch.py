"""From ids on the device to a ``Batch``: the lookups of a whole request, ready to be captured in a graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_trt.contract.model import HstuConfig
from hstu_trt.engines.cuda.device_tables import DeviceTables, folded_additional
from hstu_trt.engines.cuda.network import Batch, Network, additional_rows
from hstu_trt.engines.cuda.products import Product
from hstu_trt.plugins.layer_calls import Rows


@dataclass(frozen=True, kw_only=True)
class FusedInputs:
    """Ids and payload of a batch on the device, in the split layout; contextual tokens have places of their own."""

    token_ids: Tensor
    """int64 [features, T]: of each history feature and its candidate partner; -1 of contextual tokens."""
    tower_ids: Tensor
    """int64 [features, C]: of the item tower's features but for the post id's partner."""
    contextual_ids: Tensor
    """int64 [slots, B]"""
    actions: Tensor
    """int64 [T]"""
    timestamps: Tensor
    """int64 [T]"""
    prefix_offsets: Tensor
    """INT32 [B+1]"""
    candidate_offsets: Tensor
    """INT32 [B+1]"""
    norm: Tensor
    """fp32 [B]"""
    prefix_tokens: int


def tower_features(config: HstuConfig) -> tuple[str, ...]:
    """The item tower's features whose ids are not those of the candidates' content."""
    content = config.uih_partner[config.post_id_feature]
    return tuple(name for name in config.item_embedding_features if name != content)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[Callable[[], None]]:
    """Runs the block on a stream of its own, beside what the current stream does until it calls ``join``."""
    if device.type != "cuda":
        yield lambda: None
        return
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield lambda: current.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class FusedModel:
    """Ids -> scores."""

    def __init__(self, network: Network, tables: DeviceTables) -> None:
        self.network, self.tables = network, tables
        config, weights = network.config, network.weights
        self._config = config
        self._additional = folded_additional(config, weights, tables)
        self._tower = None if weights.item_tower.first.is_fp8 else _SplitTower(config, weights.item_tower.first, tables)

    def __call__(self, inputs: FusedInputs, out: Tensor | None = None) -> Tensor:
        """Scores fp32 [C, tasks]."""
        batch = self.batch(inputs)
        with _beside(batch.content.device) as join:
            items = self._items(inputs, batch.content[inputs.prefix_tokens :])
        rows = self.network.vectors_before_norm(batch)
        join()
        return self.network.scores(rows, inputs.timestamps[inputs.prefix_tokens :], items, out)

    def batch(self, inputs: FusedInputs) -> Batch:
        """The table rows of a batch."""
        return Batch(
            content=self.tables.look_up(self._config.uih_features[0], inputs.token_ids[0]),
            extra=self._extra(inputs),
            contextual=self._contextual(inputs),
            actions=inputs.actions,
            timestamps=inputs.timestamps,
            prefix_offsets=inputs.prefix_offsets,
            candidate_offsets=inputs.candidate_offsets,
            norm=inputs.norm,
            prefix_tokens=inputs.prefix_tokens,
        )

    def _extra(self, inputs: FusedInputs) -> Rows | None:
        features = self._config.additional_features
        if not features:
            return None
        if self._additional is not None:
            return Rows(rows=self._additional, index=inputs.token_ids[1])
        rows = [self.tables.look_up(name, inputs.token_ids[1 + n]) for n, name in enumerate(features)]
        return additional_rows(self.network.weights, torch.cat(rows, dim=1))

    def _contextual(self, inputs: FusedInputs) -> Tensor | None:
        slots = self._config.contextual_slots
        if not slots:
            return None
        rows = [self.tables.look_up(name, inputs.contextual_ids[n]) for n, name in enumerate(slots)]
        return rows[0] if len(rows) == 1 else torch.stack(rows, dim=1).flatten(0, 1)

    def _items(self, inputs: FusedInputs, content: Tensor) -> Tensor:
        """The item tower's rows [C, D] before its norm; content: rows [C, E] of the post id's partner."""
        tower = self.network.weights.item_tower
        if self._tower is None:
            from hstu_trt.engines.cuda.network import item_rows

            return item_rows(self.network.weights, self._all_rows(inputs, content))
        return tower.behind_first(*self._tower(inputs.tower_ids, content))

    def _all_rows(self, inputs: FusedInputs, content: Tensor) -> Tensor:
        others = tower_features(self._config)
        rows = [
            self.tables.look_up(name, inputs.tower_ids[others.index(name)]) if name in others else content
            for name in self._config.item_embedding_features
        ]
        return torch.cat(rows, dim=1)


class _SplitTower:
    """The item tower's first product, feature by feature; those of small tables as a table of their outputs."""

    def __init__(self, config: HstuConfig, first: Product, tables: DeviceTables) -> None:
        self._tables = tables
        width, others = config.embedding_dim, tower_features(config)
        columns = first.weight.split(width, dim=1)
        by_name = {name: columns[n].contiguous() for n, name in enumerate(config.item_embedding_features)}
        content = config.uih_partner[config.post_id_feature]
        self._content, self._bias = by_name.get(content), first.bias
        self._folded = {
            n: tables.with_missing(name) @ by_name[name].t() for n, name in enumerate(others) if tables.is_small(name)
        }
        self._wide = {n: (name, by_name[name]) for n, name in enumerate(others) if n not in self._folded}

    def __call__(self, ids: Tensor, content: Tensor) -> tuple[Tensor, Tensor | None]:
        """The product's output [C, P] but for what is returned beside it, which is to be added."""
        assert self._bias is not None
        if self._content is None:
            hidden = self._bias.expand(content.shape[0], -1).clone()
        else:
            hidden = torch.addmm(self._bias, content, self._content.t())
        for n, (name, weight) in self._wide.items():
            torch.addmm(hidden, self._tables.look_up(name, ids[n]), weight.t(), out=hidden)
        delta: Tensor | None = None
        for n, table in self._folded.items():
            rows = _rows_of(table, ids[n])
            delta = rows if delta is None else delta + rows
        return hidden, delta


def _rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a folded table [n + 1, P] whose last row stands for ids outside of [0, n); it is zeros there."""
    from hstu_trt.plugins import embedding

    if table.is_cuda:
        return embedding.lookup(ids, table, table.dtype)
    outside = (ids < 0) | (ids >= table.shape[0])
    return table[torch.where(outside, table.shape[0] - 1, ids)]
