"""Kernel outputs against float64, on sampled query rows.

Shapes: S sampled rows, K key rows of one user, H heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.bench.kernels.cases import KernelCase
from hstu_trt.bench.kernels.inputs import Tokens
from hstu_trt.export.attention import MaskOptions, valid_pairs

SAMPLED_ROWS = 600


@dataclass(frozen=True)
class UserSample:
    """Sampled query rows of one user."""

    user: int
    prefix_positions: NDArray
    """int64: positions of prefix queries."""
    candidates: NDArray
    """int64: numbers of candidates."""


def sample_rows(case: KernelCase, rows: int = SAMPLED_ROWS, seed: int = 1) -> list[UserSample]:
    """About ``rows`` query rows: the first and the last of each kind of each user, and random ones."""
    rng = np.random.default_rng(seed)
    share = rows / case.query_rows
    samples = []
    for user, history in enumerate(case.histories):
        prefix = 0 if case.cached else history
        samples.append(UserSample(user, _sampled(rng, prefix, share), _sampled(rng, case.candidates, share)))
    return samples


def _sampled(rng: np.random.Generator, count: int, share: float) -> NDArray:
    edges = [0, count - 1] if count else []
    return np.unique(np.concatenate([edges, rng.integers(0, count, round(count * share))]).astype(np.int64))


def query_rows(case: KernelCase, samples: list[UserSample]) -> Tensor:
    """Rows of q and out that the samples stand for, in their order."""
    first_prefix = np.concatenate([[0], np.cumsum(case.histories)])
    first_candidate = 0 if case.cached else case.prefix_rows
    rows = [
        part
        for s in samples
        for part in (
            first_prefix[s.user] + s.prefix_positions,
            first_candidate + s.user * case.candidates + s.candidates,
        )
    ]
    return torch.from_numpy(np.concatenate(rows))


def exact_rows(case: KernelCase, tokens: Tokens, samples: list[UserSample], alpha: float) -> Tensor:
    """The sampled rows of the output [S, H, D], computed in float64 where the tokens lie."""
    q_all = query_rows(case, samples)
    begins = np.concatenate([[0], np.cumsum(case.histories)])
    out, done = [], 0
    for s in samples:
        count = len(s.prefix_positions) + len(s.candidates)
        q, k, v = _user_tokens(case, tokens, q_all[done : done + count], s.user, begins)
        done += count
        history = case.histories[s.user]
        position = torch.from_numpy(np.concatenate([s.prefix_positions, history + s.candidates])).to(q.device)
        visible = valid_pairs(position, history, case.candidates, MaskOptions())
        weights = torch.nn.functional.silu(alpha * torch.einsum("shd,khd->hsk", q, k)) * visible
        out.append(torch.einsum("hsk,khd->shd", weights, v) / case.longest)
    return torch.cat(out)


def _user_tokens(
    case: KernelCase, tokens: Tokens, rows: Tensor, user: int, begins: NDArray
) -> tuple[Tensor, Tensor, Tensor]:
    """One user's sampled queries, and all its keys and values: prefix, then candidates."""
    candidates = case.prefix_rows + user * case.candidates
    keys = torch.cat(
        [torch.arange(begins[user], begins[user + 1]), torch.arange(candidates, candidates + case.candidates)]
    )
    device = tokens.q.device
    return tokens.rows(rows.to(device), keys.to(device)).real()


def relative_l2(actual: Tensor, exact: Tensor) -> float:
    """||actual - exact|| / ||exact||; NaN where actual holds one."""
    exact = exact.double()
    return float(torch.linalg.vector_norm(actual.double() - exact) / torch.linalg.vector_norm(exact))


def non_finite(output: Tensor) -> int:
    """Elements that are not finite: those that a kernel left out of a poisoned output, too."""
    return int((~torch.isfinite(output)).sum())
