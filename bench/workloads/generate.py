"""Generates workloads: seeded, so that nothing large is ever copied to the machine that runs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.workloads.lengths import LengthPlan, draw_lengths
from hstu_trt.bench.workloads.popularity import draw_items
from hstu_trt.bench.workloads.profiles import Profile
from hstu_trt.bench.workloads.workload import Workload, concatenate, gather
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.tensors import Limits

Timestamps = Literal["real", "ones"]
DEFAULT_SEED = 1001

# The latest query times lie within a week after this second (October 2025).
_NOW = 1_760_000_000
_WEEK = 7 * 86_400
# Seconds between events: log-normal around an hour, so that 10,000 events fill years, and every size of time bucket.
_GAP_MEDIAN, _GAP_SIGMA, _GAP_MAX = 3600.0, 2.0, 30 * 86_400
# ``uih_weight`` has this many bits.
_MAX_ACTION_TYPES = 8


def generate(
    profile: Profile,
    config: HstuConfig,
    *,
    seed: int = DEFAULT_SEED,
    timestamps: Timestamps = "real",
    limits: Limits | None = None,
) -> Workload:
    """All requests of a profile for a model, in memory; see ``generate_slots``."""
    return concatenate(list(generate_slots(profile, config, seed=seed, timestamps=timestamps, limits=limits)))


def generate_slots(
    profile: Profile,
    config: HstuConfig,
    *,
    seed: int = DEFAULT_SEED,
    timestamps: Timestamps = "real",
    limits: Limits | None = None,
) -> Iterator[Workload]:
    """The requests of a profile for a model, one workload per time slot.

    timestamps: "real" seconds, sorted, with the history before the query, or "ones" everywhere as in MLPerf's data.
    limits: cuts histories (to their oldest events) and candidates to what a deployment accepts.
    Raises ConfigError if the config has no tables, which bound the ids.
    """
    if not config.tables:
        raise ConfigError("the config holds no embedding tables, which bound a workload's ids; name an exported model")
    plan_rng, user_rng, event_rng = (np.random.default_rng([seed, part]) for part in range(3))
    plan = draw_lengths(profile.lengths, plan_rng, requests=profile.requests, users=profile.users)
    if limits is not None:
        plan = dataclasses.replace(plan, length=np.minimum(plan.length, limits.history))
    users = _users(user_rng, profile, config, plan)
    events = _Events.draw(event_rng, profile, config, plan)
    for slot in np.unique(plan.slot):
        rows = np.flatnonzero(plan.slot == slot)
        part = Workload(
            user_id=users[rows],
            key=np.stack([np.full(len(rows), slot), np.arange(len(rows))], axis=1).astype(np.int32),
            **events.histories(plan.stream[rows], plan.length[rows]),
            **_candidates(np.random.default_rng([seed, 3, int(slot)]), profile, config, len(rows), limits),
        )
        yield part if timestamps == "real" else _without_time(part)


def _users(rng: np.random.Generator, profile: Profile, config: HstuConfig, plan: LengthPlan) -> NDArray:
    """A user id per request int32 [requests]: one user per event stream, as far as the users reach."""
    tables = [config.table_of(feature.name) for feature in config.contextual_features]
    known = min([profile.users, *(table.rows for table in tables)])
    return rng.permutation(known)[plan.stream % known].astype(np.int32)


def _candidates(
    rng: np.random.Generator, profile: Profile, config: HstuConfig, requests: int, limits: Limits | None
) -> dict[str, NDArray]:
    counts = rng.choice(np.array(profile.candidates, dtype=np.int64), requests)
    if limits is not None:
        counts = np.minimum(counts, limits.candidates)
    rows = config.table_of(config.post_id_feature).rows
    items = draw_items(rng, int(counts.sum()), rows=rows, exponent=profile.zipf)
    return {"cand_off": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), "cand_item": items.astype(np.int32)}


@dataclass(frozen=True, kw_only=True)
class _Events:
    """The events of all streams, oldest first, end to end."""

    offsets: NDArray
    """int64 [streams + 1]"""
    item: NDArray
    weight: NDArray
    elapsed: NDArray
    """int64 [events + 1]: sum of the gaps before each event, over all streams."""
    end: NDArray
    """int64 [streams]: second of a query after the last event."""

    @classmethod
    def draw(cls, rng: np.random.Generator, profile: Profile, config: HstuConfig, plan: LengthPlan) -> _Events:
        """Draws as many events per stream as the longest of its histories needs."""
        longest = np.zeros(int(plan.stream.max()) + 1, dtype=np.int64)
        np.maximum.at(longest, plan.stream, plan.length)
        count = int(longest.sum())
        rows = config.table_of(config.post_id_feature).rows
        types = min(len(config.action_weights or (1,)), _MAX_ACTION_TYPES)
        gaps = np.clip(rng.lognormal(np.log(_GAP_MEDIAN), _GAP_SIGMA, count), 1, _GAP_MAX).astype(np.int64)
        return cls(
            offsets=np.concatenate([[0], np.cumsum(longest)]),
            item=draw_items(rng, count, rows=rows, exponent=profile.zipf).astype(np.int32),
            weight=(1 << rng.integers(0, types, count)).astype(np.uint8),
            elapsed=np.concatenate([[0], np.cumsum(gaps)]),
            end=_NOW + rng.integers(0, _WEEK, len(longest)),
        )

    def histories(self, streams: NDArray, lengths: NDArray) -> dict[str, NDArray]:
        """The first ``lengths`` events of the streams, and queries at the moment of the event that came next."""
        starts = self.offsets[:-1][streams]
        at, offsets = gather(starts, lengths)
        last, end = self.elapsed[self.offsets[1:][streams]], self.end[streams]
        return {
            "uih_off": offsets,
            "uih_item": self.item[at],
            "uih_weight": self.weight[at],
            "uih_ts": (self.elapsed[at] + np.repeat(end - last, lengths)).astype(np.int32),
            "query_time": (self.elapsed[starts + lengths] + end - last).astype(np.int32),
        }


def _without_time(workload: Workload) -> Workload:
    ones = {name: np.ones_like(getattr(workload, name)) for name in ("uih_ts", "query_time")}
    return dataclasses.replace(workload, **ones)
