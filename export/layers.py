"""Building blocks of both model families. Attribute names are the checkpoint's keys, hence the leading underscores.

Norms hold fp32 parameters and compute in fp32 whatever the activations are; Linear weights have the model's dtype.
Shape suffixes: T tokens, D model width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hstu_trt.contract.model import HstuConfig
from hstu_trt.export import torch_ops  # noqa: F401 - registers the torch ops used below

MLP_EPS = 1e-5
STU_EPS = 1e-6

# Takes (q, k, v) of a layer, each [tokens, heads, width], and their scales if they are e4m3; returns the attention.
Attend = Callable[..., Tensor]
# Takes (q, k, v) and returns them in e4m3, with their scales.
QuantiseTokens = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
Product = Callable[[Tensor], Tensor]


class LayerNorm(nn.Module):
    """Layer norm over the last axis, in fp32; returns fp32."""

    def __init__(self, width: int, eps: float = MLP_EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)


class SwishLayerNorm(LayerNorm):
    """x * sigmoid(LN(x)): x itself is gated, not its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(super().forward(x)).to(x.dtype)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Linear, SwishLayerNorm, Linear, LayerNorm: the reference's MLP of preprocessor and item tower. Returns fp32."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), SwishLayerNorm(hidden), nn.Linear(hidden, outputs), LayerNorm(outputs)
    )


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of each user stand: offsets INT32 [B+1] of prefixes (contextual + history) and candidates."""

    prefix_offsets: Tensor
    candidate_offsets: Tensor

    @property
    def prefix_lengths(self) -> Tensor:
        return self.prefix_offsets[1:] - self.prefix_offsets[:-1]

    @property
    def candidate_lengths(self) -> Tensor:
        return self.candidate_offsets[1:] - self.candidate_offsets[:-1]


def users_of(offsets: Tensor, tokens: int) -> Tensor:
    """The user of each packed token, int64 [tokens], without a data-dependent shape."""
    index = torch.arange(tokens, device=offsets.device)
    return (index[:, None] >= offsets[None, 1:]).sum(dim=1)


class StuLayer(nn.Module):
    """One HSTU layer of the ranking family (the reference's modules/stu.py and ops/pytorch/pt_hstu_linear.py).

    In an fp8 model, modules of ``fp8.py`` may stand for the products and quantise the attention's tokens.
    """

    uvqk_product: Product | None
    """Instead of ``_uvqk_weight`` and ``_uvqk_beta``."""
    output_product: Product | None
    """Instead of ``_output_weight``."""
    quantise_tokens: QuantiseTokens | None

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.heads, self.qk_dim, self.v_dim = config.heads, config.qk_dim, config.v_dim
        width, v_width, qk_width = config.model_dim, config.heads * config.v_dim, config.heads * config.qk_dim
        self.widths = (v_width, v_width, qk_width, qk_width)
        norm_width = config.heads if config.group_norm else v_width
        self._uvqk_weight = nn.Parameter(torch.zeros(width, sum(self.widths)))
        self._uvqk_beta = nn.Parameter(torch.zeros(sum(self.widths)))
        self._input_norm_weight = nn.Parameter(torch.ones(width))
        self._input_norm_bias = nn.Parameter(torch.zeros(width))
        self._output_weight = nn.Parameter(torch.zeros(3 * v_width, width))
        self._output_norm_weight = nn.Parameter(torch.ones(norm_width))
        self._output_norm_bias = nn.Parameter(torch.zeros(norm_width))
        self.group_norm = config.group_norm
        self.uvqk_product = self.output_product = self.quantise_tokens = None

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Norms the tokens and projects them to (SiLU(u) [T, H*Dv], v, q, k [T, H, D])."""
        normed = functional.layer_norm(
            x_TD.float(), x_TD.shape[-1:], self._input_norm_weight, self._input_norm_bias, STU_EPS
        )
        normed = normed.to(x_TD.dtype)
        if self.uvqk_product is None:
            uvqk = torch.addmm(self._uvqk_beta, normed, self._uvqk_weight)
        else:
            uvqk = self.uvqk_product(normed)
        u, v, q, k = uvqk.split(self.widths, dim=1)
        return functional.silu(u), self._heads(v, self.v_dim), self._heads(q, self.qk_dim), self._heads(k, self.qk_dim)

    def _heads(self, t: Tensor, width: int) -> Tensor:
        return t.reshape(-1, self.heads, width)

    def output(self, x_TD: Tensor, u: Tensor, attention_THD: Tensor) -> Tensor:
        """Norms and gates the fp32 attention output and adds the projection of [u, attention, gated] to the tokens."""
        attention = attention_THD.reshape(-1, self.heads * self.v_dim)
        gated = u.float() * self._output_norm(attention_THD.float())
        joined = torch.cat([u, attention.to(u.dtype), gated.to(u.dtype)], dim=1)
        if self.output_product is None:
            return torch.addmm(x_TD, joined, self._output_weight)
        return x_TD + self.output_product(joined)

    def _output_norm(self, attention_THD: Tensor) -> Tensor:
        if not self.group_norm:
            flat = attention_THD.reshape(-1, self.heads * self.v_dim)
            return functional.layer_norm(
                flat, flat.shape[-1:], self._output_norm_weight, self._output_norm_bias, STU_EPS
            )
        normed = functional.layer_norm(attention_THD, (self.v_dim,), eps=STU_EPS)
        scaled = normed * self._output_norm_weight[:, None] + self._output_norm_bias[:, None]
        return scaled.reshape(-1, self.heads * self.v_dim)

    def attended(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention output; q, k and v are quantised before where the layer does that."""
        return attend(q, k, v) if self.quantise_tokens is None else attend(*self.quantise_tokens(q, k, v))

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        """All tokens in, all tokens out."""
        u, v, q, k = self.project(x_TD)
        return self.output(x_TD, u, self.attended(attend, q, k, v))

    def forward_tail(self, x_TD: Tensor, first: int | torch.SymInt, attend: Attend) -> Tensor:
        """The rows from ``first`` on alone; earlier rows serve as keys and values only."""
        u, v, q, k = self.project(x_TD)
        return self.output(x_TD[first:], u[first:], self.attended(attend, q[first:], k, v))


class StuStack(nn.Module):
    """The layers, with the attention options they share."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.alpha = config.alpha
        self.options = config.attention
        self._stu_layers = nn.ModuleList(StuLayer(config) for _ in range(config.layers))

    @property
    def layers(self) -> list[StuLayer]:
        """The layers, first to last."""
        return [cast(StuLayer, layer) for layer in self._stu_layers]

    def attend(self, query_offsets: Tensor, layout: TokenLayout, norm: Tensor) -> Attend:
        """The attention op with everything bound but (q, k, v) and their scales.

        Its output is fp32: 1/N leaves too little for fp16.
        """

        def call(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor) -> Tensor:
            return torch.ops.hstu_trt.attention(
                q, k, v, query_offsets, layout.prefix_offsets, layout.candidate_offsets, norm,
                *(scales or [None] * 3), *[None] * 5,
                self.alpha, True,
                self.options.max_attn_len, self.options.contextual_seq_len, self.options.min_full_attn_seq_len,
                1, torch.float32,
            )  # fmt: skip

        return call

    def forward(
        self,
        prefix_TD: Tensor,
        candidates_TD: Tensor,
        layout: TokenLayout,
        norm: Tensor,
        taps: list[Tensor] | None = None,
    ) -> Tensor:
        """Runs the layers on the split token layout and returns the candidate rows.

        The last layer computes candidate rows only, since nothing reads the others; with ``taps`` it computes all
        rows, and each layer's output ``[Tp + Tc, D]`` is appended to the list.
        """
        x = torch.cat([prefix_TD, candidates_TD])
        prefix_tokens = prefix_TD.shape[0]
        everything = self.attend(layout.prefix_offsets, layout, norm)
        full = self.layers if taps is not None else self.layers[:-1]
        for layer in full:
            x = layer(x, everything)
            if taps is not None:
                taps.append(x)
        if taps is not None:
            return x[prefix_tokens:]
        candidates_only = self.attend(torch.zeros_like(layout.prefix_offsets), layout, norm)
        return self.layers[-1].forward_tail(x, prefix_tokens, candidates_only)
