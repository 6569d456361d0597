"""Random inputs of the layer kernels: rows of odd counts, every width class, and views with strides."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_trt.plugins.layer_calls import Norm, Rows, TokenInputs, TokenWeights, VectorWeights

WIDTHS = (8, 40, 256, 512, 520, 1024, 2048)
ROWS = (1, 7, 133)
SCALES = (None, 0.03)


class Draw:
    """Seeded tensors on a device."""

    def __init__(self, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float16) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device, self.dtype = device, dtype

    def rows(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * scale + offset
        return x.to(self.device, self.dtype)

    def fp32(self, *shape: int, offset: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) + offset).to(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def strided(self, rows: int, width: int) -> Tensor:
        """Columns out of a wider matrix."""
        return self.rows(rows, 3 * width)[:, width : 2 * width]

    def norm(self, width: int, eps: float = 1e-5) -> Norm:
        return Norm(gain=self.fp32(width, offset=1.0), bias=self.fp32(width), eps=eps)


HISTORIES = ((5, 0, 63, 1, 0), (3, 1, 40, 0, 2))
"""History and candidates of each user: empty users, users without a history or without candidates."""


def tokens(draw: Draw, width: int, *, slots: int = 1, table: bool = True) -> tuple[TokenWeights, TokenInputs]:
    """A token stream with real timestamps, times before the epoch of others, and ids outside of the table."""
    history, candidates = (torch.tensor(part) for part in HISTORIES)
    prefix = history + slots
    total, items = int(prefix.sum()), int(candidates.sum())
    rows = total + items
    extra = Rows(
        rows=draw.rows(17, width) if table else draw.rows(rows, width),
        index=draw.integers(-2, 19, rows) if table else None,
    )
    masks = (1, 2, 12)
    now = 1_760_000_000
    times = now - draw.integers(-100, 400_000_000, rows)
    weights = TokenWeights(
        content_norm=draw.norm(width), actions_table=draw.rows(9, width), action_masks=masks,
        position_table=draw.rows(50, width), time_table=draw.rows(300, width), slots=slots,
    )  # fmt: skip
    inputs = TokenInputs(
        content=draw.rows(rows, width), extra=extra, actions=draw.integers(0, 16, rows),
        contextual=draw.rows(len(history) * slots, width) if slots else None, timestamps=times,
        prefix_offsets=_offsets(prefix).to(draw.device), candidate_offsets=_offsets(candidates).to(draw.device),
        prefix_tokens=total,
    )  # fmt: skip
    return weights, inputs


def _offsets(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()


def vector_weights(draw: Draw, kind: str, width: int) -> VectorWeights:
    norm = None if kind == "l2_norm" else draw.norm(width)
    return VectorWeights(kind=kind, norm=norm, time_weight=draw.fp32(4, width) if kind == "timestamp" else None)
