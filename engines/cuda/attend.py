"""The attention of a forward: one tile list for all full layers, one for the candidates-only last layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.ops import TORCH_NAMESPACE
from hstu_trt.plugins.attention import AttentionPlan, attention
from hstu_trt.plugins.parameters import AttentionCall, AttentionOptions, Offsets, Scales


class Attend:
    """Attention over one batch.

    whole_items: a user's bits are the same in any batch, and small batches take longer (kernels/attention/params.h).
    """

    def __init__(
        self, config: HstuConfig, prefix_offsets: Tensor, candidate_offsets: Tensor, norm: Tensor, *, whole_items: bool
    ) -> None:
        options = config.attention
        self._options = AttentionOptions(
            config.alpha, True, options.max_attn_len, options.contextual_seq_len, options.min_full_attn_seq_len, 1
        )
        self._prefix, self._candidates, self._norm = prefix_offsets, candidate_offsets, norm
        self._none = torch.zeros_like(prefix_offsets)
        self._whole_items = whole_items
        self._plans = {False: AttentionPlan(), True: AttentionPlan()}

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, ...] | None, out: Tensor, *, tail: bool = False
    ) -> None:
        """Attention of q [Tq, H, Dqk] into ``out`` [Tq, H, Dv]; ``tail``: q holds the candidates alone."""
        if not q.is_cuda:
            out.copy_(self._on_cpu(q, k, v, scales, tail=tail))
            return
        offsets = Offsets(self._none if tail else self._prefix, self._prefix, self._candidates)
        call = AttentionCall(
            q=q, k=k, v=v, offsets=offsets, norm=self._norm, options=self._options,
            scales=None if scales is None else Scales(*scales), whole_items=self._whole_items,
        )  # fmt: skip
        attention(call, out=out, plan=self._plans[tail])

    def _on_cpu(self, q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, ...] | None, *, tail: bool) -> Tensor:
        """By the plain PyTorch op of the export room, which whoever opens the runner has registered."""
        namespace = getattr(torch.ops, TORCH_NAMESPACE)
        if not hasattr(namespace, "attention"):
            raise ConfigError(
                "without a GPU, the cuda runner needs export's torch ops: import hstu_trt.export.torch_ops"
            )
        o = self._options
        return namespace.attention(
            q, k, v, self._none if tail else self._prefix, self._prefix, self._candidates, self._norm,
            *(scales or [None] * 3), *[None] * 5, o.alpha, o.causal, o.max_attn_len, o.contextual_seq_len,
            o.min_full_attn_seq_len, o.candidate_group_size, torch.float32,
        )  # fmt: skip
