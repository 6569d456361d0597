"""Random calls of attention: what is asked for (Case), its tokens user by user (Tokens), and the call for the kernels.

Tokens are kept per user, whole prefixes and candidates, so that one call can be assembled for all users, for some of
them, with a poisoned one, behind a cache or without, and stays the same call to the oracle.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hstu_trt.plugins.attention import quantise
from hstu_trt.plugins.parameters import AttentionOptions

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
TILE_EDGES = [0, 1, 2, 31, 33, 63, 64, 65, 79, 81, 95, 97, 127, 128, 129, 191, 193, 255, 256, 257, 320, 383, 385, 513]
CANDIDATES = [0, 0, 1, 2, 5, 31, 63, 64, 65, 100, 127, 128, 129, 200]


@dataclass(frozen=True)
class User:
    """Lengths of one user: cached tokens, prefix rows of the call, how many of those query, candidates."""

    cached: int
    rows: int
    queries: int
    candidates: int

    @property
    def prefix(self) -> int:
        return self.cached + self.rows


@dataclass(frozen=True)
class Case:
    """All that makes a call, but for the values, which follow from the seed."""

    seed: int
    users: tuple[User, ...]
    heads: int = 2
    qk_dim: int = 64
    v_dim: int = 64
    dtype: str = "fp16"
    output: str = "fp16"
    options: AttentionOptions = field(default_factory=AttentionOptions)
    norm: str = "one"
    """one or users."""
    attn_scale: str = "none"
    """none, one or rows."""
    layout: str = "packed"
    """packed; padded: rows further apart; uvqk: slices of one tensor; odd: no tensor is 16-byte aligned."""
    cache: str = "none"
    """none, contiguous or paged."""
    page_size: int = 128
    bias: bool = False
    packed_values: bool = False
    per_head_scales: bool = False
    slack: int = 0
    """Rows of q, k, v and out beyond those in use."""
    outliers: float = 1.0
    """Factor on one token in 128."""
    outlier_dims: float = 1.0
    """Factor on one dim in 64 of q and k."""

    @property
    def max_len(self) -> int:
        return max((user.prefix + user.candidates for user in self.users), default=0)


def random_case(seed: int) -> Case:
    """The case of a number: shapes around tile edges, any mix of options."""
    rng = random.Random(seed)
    dtype = rng.choices(["fp16", "bf16", "fp8", "fp32"], [5, 3, 3, 1])[0]
    cache = rng.choices(["none", "contiguous", "paged"], [7, 2, 2])[0]
    qk_dim = rng.choice([16, 32, 48, 64, 64, 64, 128, 128, 128, 256, 256])
    kind = rng.choices(["any", "no candidates", "only candidates", "candidates query"], [6, 1, 1, 2])[0]
    users = tuple(_user(rng, kind, cache != "none") for _ in range(rng.choice([0, 1, 1, 2, 3, 4, 7])))
    plain = cache == "none"
    return Case(
        seed=seed,
        users=users,
        heads=rng.choice([1, 2, 3, 4]),
        qk_dim=qk_dim,
        v_dim=rng.choice([*[qk_dim] * 6, 24, 32, 64, 128, 256]),
        dtype=dtype,
        output=rng.choice(["fp32", "bf16" if dtype == "bf16" else "fp16"]) if dtype != "fp32" else "fp32",
        options=_options(rng, qk_dim, dtype),
        norm=rng.choice(["one", "one", "users" if users else "one"]),
        attn_scale=rng.choice(["none", "none", "none", "one", "rows"]),
        layout=rng.choices(["packed", "padded", "uvqk", "odd"], [4, 3, 4, 1])[0],
        cache=cache,
        page_size=128 if dtype == "fp8" else rng.choice([64, 128, 256]),
        bias=plain and dtype in ("fp16", "bf16") and rng.random() < 0.12,
        packed_values=dtype == "fp8" and rng.random() < 0.5,
        per_head_scales=rng.random() < 0.5,
        slack=rng.choice([0, 0, 0, 1, 130]),
        outliers=rng.choice([1.0] * 5 + [6.0]) if dtype != "fp8" else 1.0,
    )


def _user(rng: random.Random, kind: str, cached: bool) -> User:
    rows = rng.choice(TILE_EDGES) if rng.random() < 0.7 else rng.randrange(0, 400)
    candidates = rng.choice(CANDIDATES)
    if kind == "no candidates":
        candidates = 0
    if kind == "only candidates":
        rows = 0
    queries = 0 if kind == "candidates query" else rows
    if cached and rng.random() < 0.3:
        rows, queries = 0, 0
    if queries and rng.random() < 0.15:
        queries = rng.randrange(rows + 1)
    return User(rng.choice(TILE_EDGES) if cached else 0, rows, queries, candidates)


def _options(rng: random.Random, qk_dim: int, dtype: str) -> AttentionOptions:
    window = rng.choice([0, 0, 1, 7, 64, 100, 256])
    return AttentionOptions(
        alpha=qk_dim**-0.5 * (1.0 if dtype == "fp8" else rng.choice([1.0, 1.0, 0.3, 3.0])),
        causal=rng.random() > 0.04,
        max_attn_len=window,
        contextual_seq_len=rng.choice([0, 0, 0, 1, 2, 5, 70]),
        min_full_attn_seq_len=rng.choice([0, 1, 10, 64, 150]) if window else 0,
        candidate_group_size=rng.choice([1, 1, 1, 2, 3, 4, 8, 64]),
    )


@dataclass(frozen=True)
class Tokens:
    """Values of a case, one entry per user: q and k and v of the whole prefix, then the candidates.

    Without users, one empty entry, which tells shapes and types.
    """

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    scales: tuple[Tensor, Tensor, Tensor] | None
    norm: Tensor
    attn_scale: list[Tensor] | None
    """A number per token, as q has."""
    position_bias: Tensor
    time_bias: Tensor
    timestamps: list[Tensor]

    def poisoned(self, user: int) -> Tokens:
        """With NaN and Inf in one user's tokens."""

        def poison(tensors: list[Tensor], value: float) -> list[Tensor]:
            bad = torch.full_like(tensors[user], 0.0, dtype=torch.float32) + value
            return [bad.to(t.dtype) if n == user else t for n, t in enumerate(tensors)]

        inf = math.nan if self.scales else math.inf  # e4m3 has no infinity
        return dataclasses.replace(
            self, q=poison(self.q, math.nan), k=poison(self.k, inf), v=poison(self.v, math.nan)
        )  # fmt: skip


def make_tokens(case: Case, device: torch.device | str) -> Tokens:
    """The values of a case, of order one."""
    generator = torch.Generator(device).manual_seed(case.seed)
    lengths = [user.prefix + user.candidates for user in case.users] or [0]
    total = sum(lengths)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tensors, scales = [], []
    for dim, outlier_dims in ((case.qk_dim, case.outlier_dims), (case.qk_dim, case.outlier_dims), (case.v_dim, 1.0)):
        values = randn(total, case.heads, dim)
        values[..., ::64] *= outlier_dims
        rare = torch.rand(total, generator=generator, device=device) < 1 / 128
        values *= torch.where(rare, case.outliers, 1.0)[:, None, None]
        if case.dtype == "fp8":
            values, scale = quantise(values, per_head=case.per_head_scales)
            scales.append(scale)
        tensors.append(list(values.to(DTYPES[case.dtype]).split(lengths)))
    norms = 1 if case.norm == "one" else len(case.users)
    elapsed = torch.randint(0, 90_000, (total,), generator=generator, device=device)
    return Tokens(
        *tensors,
        scales=(scales[0], scales[1], scales[2]) if scales else None,
        norm=torch.full((norms,), float(max(case.max_len, 1)), device=device) * (1 + randn(norms).abs()),
        attn_scale=_attn_scale(case, randn(total).abs() + 0.01, lengths),
        position_bias=0.3 * randn(2 * (case.max_len + 2) - 1),
        time_bias=0.3 * randn(129),
        timestamps=[part.cumsum(0) + 1_700_000_000 for part in elapsed.split(lengths)],
    )


def _attn_scale(case: Case, per_token: Tensor, lengths: Sequence[int]) -> list[Tensor] | None:
    if case.attn_scale == "none":
        return None
    return list(per_token.split(list(lengths))) if case.attn_scale == "rows" else [per_token.new_full((1,), 0.03)]
