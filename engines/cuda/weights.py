"""The weights of a model folder, as the runner's kernels and products take them.

Names are the checkpoint's (export/model.py writes them): the contract between the two rooms is the file.
Parts that see few distinct inputs become tables here, since their output depends on nothing else: the actions' MLP (one
row for each set of actions), and the MLP of a single additional feature (one row for each of the table's rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.engines.cuda.products import Product
from hstu_trt.plugins import layer
from hstu_trt.plugins.layer_calls import Norm, TokenWeights, VectorWeights
from hstu_trt.plugins.layer_library import MAX_ACTIONS

MLP_EPS = 1e-5
STU_EPS = 1e-6

_TRANSDUCER = "_hstu_transducer"
_PREPROCESSOR = f"{_TRANSDUCER}._input_preprocessor"
_POSTPROCESSOR = f"{_TRANSDUCER}._output_postprocessor"
_HEAD = "_multitask_module._prediction_module"


@dataclass(frozen=True, kw_only=True)
class Dense:
    """The tensors of weights.safetensors, where they go and in which dtype the model computes."""

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device

    def values(self, name: str) -> Tensor:
        """A tensor in the compute dtype."""
        return self.tensors[name].to(self.device, self.dtype).contiguous()

    def fp32(self, name: str) -> Tensor:
        return self.tensors[name].to(self.device, torch.float32).contiguous()

    def norm(self, weight: str, bias: str, eps: float = MLP_EPS) -> Norm:
        return Norm(gain=self.fp32(weight), bias=self.fp32(bias), eps=eps)

    def real(self, name: str) -> Tensor:
        """The weight of a Linear layer, fp32 [outputs, inputs]; of one in fp8, what its stored values mean."""
        scales = self.tensors.get(f"{name}.weight_scale")
        weight = self.tensors[f"{name}.weight"].float()
        return (weight if scales is None else weight * scales.float()[:, None]).to(self.device)

    def linear(self, name: str, *, bias: bool = True) -> Product:
        return Product.of(self.tensors, name, self.dtype, self.device, bias=bias)

    def matrix(self, weight: str, bias: str | None, fp8_name: str) -> Product:
        """A product whose weight stands as [inputs, outputs], or in fp8 as a Linear layer ``fp8_name``."""
        if f"{fp8_name}.weight" in self.tensors:
            return self.linear(fp8_name, bias=bias is not None)
        matrix = self.tensors[weight].to(self.device, self.dtype).t().contiguous()
        return Product(weight=matrix, bias=None if bias is None else self.values(bias), dtype=self.dtype)


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Linear, SwishLayerNorm, Linear, LayerNorm; the last norm is left to whoever reads the rows next."""

    first: Product
    swish: Norm
    second: Product
    norm: Norm

    @classmethod
    def of(cls, dense: Dense, name: str) -> Mlp:
        return cls(
            first=dense.linear(f"{name}.0"), swish=dense.norm(f"{name}.1.weight", f"{name}.1.bias"),
            second=dense.linear(f"{name}.2"), norm=dense.norm(f"{name}.3.weight", f"{name}.3.bias"),
        )  # fmt: skip

    def before_norm(self, rows: Tensor) -> Tensor:
        """The second product's output for rows [T, inputs] in the compute dtype."""
        return self.behind_first(self.first(as_input(rows, self.first)))

    def behind_first(self, hidden: Tensor, delta: Tensor | None = None) -> Tensor:
        """As ``before_norm``, from the first product's output; ``delta`` is added to that."""
        return self.second(layer.norm_rows(hidden, self.swish, delta=delta, swish=True, scale=self.second.input_scale))

    def __call__(self, rows: Tensor) -> Tensor:
        return layer.norm_rows(self.before_norm(rows), self.norm)


def as_input(rows: Tensor, product: Product) -> Tensor:
    """Rows as a product takes them: in e4m3 for an fp8 one."""
    return rows if product.input_scale is None else layer.quantise_rows([(rows, product.input_scale)])[0]


class TokenScales(NamedTuple):
    """Scales of q, k and v in e4m3: fp32 [1] on the device, and their values."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_value: float
    k_value: float
    v_value: float

    @classmethod
    def of(cls, dense: Dense, name: str) -> TokenScales | None:
        """None where a layer's attention is not in fp8."""
        if f"{name}.q_scale" not in dense.tensors:
            return None
        q, k, v = (dense.fp32(f"{name}.{part}_scale").reshape(1) for part in "qkv")
        return cls(q, k, v, float(q), float(k), float(v))


@dataclass(frozen=True, kw_only=True)
class StuWeights:
    """One attention layer."""

    input_norm: Norm
    uvqk: Product
    """Outputs: u, v, q, k."""
    token_scales: TokenScales | None
    """Of fp8 attention."""
    output_norm: Norm
    output: Product

    @classmethod
    def of(cls, dense: Dense, number: int) -> StuWeights:
        name = f"{_TRANSDUCER}._stu_module._stu_layers.{number}"
        return cls(
            input_norm=dense.norm(f"{name}._input_norm_weight", f"{name}._input_norm_bias", STU_EPS),
            uvqk=dense.matrix(f"{name}._uvqk_weight", f"{name}._uvqk_beta", f"{name}.uvqk_product"),
            token_scales=TokenScales.of(dense, f"{name}.quantise_tokens"),
            output_norm=dense.norm(f"{name}._output_norm_weight", f"{name}._output_norm_bias", STU_EPS),
            output=dense.matrix(f"{name}._output_weight", None, f"{name}.output_product"),
        )


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """A whole ranking model."""

    content: Mlp
    additional: Mlp | None
    contextual: Tensor | None
    """[slots, E, D]"""
    contextual_bias: Tensor | None
    """[slots, 1, D]"""
    tokens: TokenWeights
    layers: tuple[StuWeights, ...]
    combiner: Product | None
    """Of the timestamp postprocessor: its first D columns and the bias."""
    vectors: VectorWeights
    item_tower: Mlp
    head: Product
    head_norm: Norm
    score_weight: Tensor
    """fp32 [tasks, P]"""
    score_bias: Tensor

    @classmethod
    def of(cls, config: HstuConfig, dense: Dense) -> ModelWeights:
        """Raises ConfigError for a model that the runner does not do."""
        slots = bool(config.contextual_slots)
        combiner, vectors = _postprocessor(config, dense)
        name = f"{_PREPROCESSOR}._batched_contextual_linear"
        return cls(
            content=Mlp.of(dense, f"{_PREPROCESSOR}._content_embedding_mlp"),
            additional=Mlp.of(dense, f"{_PREPROCESSOR}._additional_embedding_mlp")
            if config.additional_features
            else None,
            contextual=dense.values(f"{name}_weights") if slots else None,
            contextual_bias=dense.values(f"{name}_bias")[:, None] if slots else None,
            tokens=_token_weights(config, dense),
            layers=tuple(StuWeights.of(dense, number) for number in range(config.layers)),
            combiner=combiner,
            vectors=vectors,
            item_tower=Mlp.of(dense, "_item_embedding_mlp"),
            head=dense.linear(f"{_HEAD}.0"),
            head_norm=dense.norm(f"{_HEAD}.1.weight", f"{_HEAD}.1.bias"),
            score_weight=dense.real(f"{_HEAD}.2"),
            score_bias=dense.fp32(f"{_HEAD}.2.bias"),
        )


def _token_weights(config: HstuConfig, dense: Dense) -> TokenWeights:
    encoder, content = f"{_TRANSDUCER}._positional_encoder", f"{_PREPROCESSOR}._content_embedding_mlp"
    last_bucket = config.time_buckets if config.time_bucket_clamp == "rows" else config.model_dim - 1
    return TokenWeights(
        content_norm=dense.norm(f"{content}.3.weight", f"{content}.3.bias"),
        actions_table=_actions_table(config, dense),
        action_masks=config.action_weights or (),
        position_table=dense.values(f"{encoder}._position_embeddings_weight"),
        time_table=dense.values(f"{encoder}._timestamp_embeddings_weight")[: last_bucket + 1],
        slots=len(config.contextual_slots),
    )


def _actions_table(config: HstuConfig, dense: Dense) -> Tensor | None:
    """[2^masks + 1, D]: the actions' MLP for each set of actions, and for candidates."""
    if config.action_weights is None:
        return None
    count = len(config.action_weights)
    if count > MAX_ACTIONS:
        raise ConfigError(f"the cuda runner does models of at most {MAX_ACTIONS} kinds of actions; this has {count}")
    encoder = f"{_PREPROCESSOR}._action_encoder"
    table = dense.values(f"{encoder}._action_embedding_table")
    sets = torch.arange(1 << count, device=dense.device)
    taken = torch.stack([sets >> bit & 1 for bit in range(count)], dim=1)
    rows = (taken[:, :, None].to(table.dtype) * table).reshape(len(sets), -1)
    candidate = dense.values(f"{encoder}._target_action_embedding_table")
    return Mlp.of(dense, f"{_PREPROCESSOR}._action_embedding_mlp")(torch.cat([rows, candidate]))


def _postprocessor(config: HstuConfig, dense: Dense) -> tuple[Product | None, VectorWeights]:
    if config.postprocessor == "l2_norm":
        return None, VectorWeights(kind="l2_norm", norm=None, time_weight=None)
    norm = dense.norm(f"{_POSTPROCESSOR}._layer_norm.weight", f"{_POSTPROCESSOR}._layer_norm.bias")
    if config.postprocessor == "layer_norm":
        return None, VectorWeights(kind="layer_norm", norm=norm, time_weight=None)
    name = f"{_POSTPROCESSOR}._time_feature_combiner"
    real, width = dense.real(name), config.model_dim
    time_weight = real[:, width:].t().contiguous()
    # In an fp8 model too these few rows are multiplied in fp16, by the weights as they were rounded.
    weight = real[:, :width].to(dense.dtype).contiguous()
    combiner = Product(weight=weight, bias=dense.values(f"{name}.bias"), dtype=dense.dtype)
    return combiner, VectorWeights(kind="timestamp", norm=norm, time_weight=time_weight)
