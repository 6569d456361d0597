"""Meta's DlrmHSTU as three stages. Attribute names are the checkpoint's keys, hence the leading underscores.

    hstu_stage   rows, timestamps, actions -> user vectors [candidates, D]
    head_stage   user vectors, candidate rows -> scores [candidates, tasks]

The reference is github.com/meta-recsys/generative-recommenders at commit db1bf8f2e8f6 (Apache-2.0), folder
generative_recommenders; its modules/dlrm_hstu.py and modules/postprocessors.py are followed to the letter, oddities
included. The goldens in tests/golden are its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from hstu_trt.contract.model import HstuConfig
from hstu_trt.export.fp8 import Fp8Linear, Fp8Tokens
from hstu_trt.export.layers import LayerNorm, StuStack, SwishLayerNorm, mlp
from hstu_trt.export.preprocessor import PositionalEncoder, Preprocessor, full_layout

Module = TypeVar("Module", bound=nn.Module)

L2_NORM_EPS = 1e-6
# The reference's circle: 2 * 3.14, not 2 * pi.
FULL_CIRCLE = 2 * 3.14


class L2NormPostprocessor(nn.Module):
    """x / max(|x|, 1e-6)."""

    def forward(self, x_TD: Tensor, timestamps_T: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x_TD.float(), dim=-1, keepdim=True)
        return (x_TD.float() / norm.clamp(min=L2_NORM_EPS)).to(x_TD.dtype)


class LayerNormPostprocessor(nn.Module):
    """A layer norm."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self._layer_norm = LayerNorm(config.model_dim)

    def forward(self, x_TD: Tensor, timestamps_T: Tensor) -> Tensor:
        return self._layer_norm(x_TD).to(x_TD.dtype)


class TimestampPostprocessor(nn.Module):
    """Appends hour of day and day of week as cos and sin, projects back and norms."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self._layer_norm = LayerNorm(config.model_dim)
        self._time_feature_combiner = nn.Linear(config.model_dim + 4, config.model_dim)
        self.register_buffer("_period_units", torch.tensor([[3600.0, 86400.0]]))
        self.register_buffer("_units_per_period", torch.tensor([[24.0, 7.0]]))

    def forward(self, x_TD: Tensor, timestamps_T: Tensor) -> Tensor:
        features = self._time_features(timestamps_T).to(x_TD.dtype)
        joined = torch.cat([x_TD, features], dim=1)
        return self._layer_norm(self._time_feature_combiner(joined)).to(x_TD.dtype)

    def _time_features(self, timestamps_T: Tensor) -> Tensor:
        """fp32 [T, 4]: cos and sin of the hour in the day, then of the day in the week.

        Units are counted in fp32, as in the reference: timestamps beyond 2^24 units (milliseconds, as some datasets
        have them) lose the low digits of the count. The part of a unit is taken off in integers first, since a fp32
        quotient of seconds would land in the next hour for 1.3 % of present-day timestamps; rounding the quotient
        repairs what fp32 then misses of a whole number.
        """
        seconds = timestamps_T.float()[:, None]
        unit, per_period = cast(Tensor, self._period_units), cast(Tensor, self._units_per_period)
        whole_units = seconds - seconds.long().remainder(unit.long()).float()
        units = (whole_units / unit).round().long()
        angle = units.remainder(per_period.long()).float() / per_period * FULL_CIRCLE
        return torch.stack([angle.cos(), angle.sin()], dim=2).flatten(1)


class HstuTransducer(nn.Module):
    """Preprocessor, position and time encoding, STU layers, postprocessor."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.slots = len(config.contextual_slots)
        self._input_preprocessor = Preprocessor(config)
        self._positional_encoder = PositionalEncoder(config)
        self._stu_module = StuStack(config)
        self._output_postprocessor = {
            "l2_norm": lambda _: L2NormPostprocessor(),
            "layer_norm": LayerNormPostprocessor,
            "timestamp": TimestampPostprocessor,
        }[config.postprocessor](config)

    def forward(self, inputs: Mapping[str, Tensor], taps: list[Tensor] | None = None) -> Tensor:
        """User vectors, one per candidate: [candidates, D]."""
        layout = full_layout(inputs, self.slots)
        prefix, items = self._input_preprocessor(inputs, layout)
        prefix, items = self._positional_encoder(prefix, items, inputs, layout)
        rows = self._stu_module(prefix, items, layout, inputs["attention_norm"], taps)
        return self._output_postprocessor(rows, inputs["candidate_timestamps"])


class MultitaskModule(nn.Module):
    """The prediction head over the product of user and item vectors."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self._prediction_module = nn.Sequential(
            nn.Linear(config.model_dim, config.tower_dim),
            SwishLayerNorm(config.tower_dim),
            nn.Linear(config.tower_dim, len(config.tasks)),
        )

    def forward(self, product_TD: Tensor) -> Tensor:
        """Raw logits [candidates, tasks]."""
        return self._prediction_module(product_TD)


class DlrmHstu(nn.Module):
    """The dense part of DlrmHSTU; embedding tables live in the tables room."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        items = len(config.item_embedding_features)
        self._hstu_transducer = HstuTransducer(config)
        self._item_embedding_mlp = mlp(items * config.embedding_dim, config.tower_dim, config.model_dim)
        self._multitask_module = MultitaskModule(config)

    def hstu_stage(self, inputs: Mapping[str, Tensor], taps: list[Tensor] | None = None) -> Tensor:
        """User vectors [candidates, D]; see ``StuStack.forward`` for ``taps``."""
        return self._hstu_transducer(inputs, taps)

    def head_stage(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Scores fp32 [candidates, tasks]: probabilities of binary tasks, raw values of regression tasks."""
        user = inputs["user_embeddings"]
        width = len(self.config.item_embedding_features) * self.config.embedding_dim
        item = self._item_embedding_mlp(inputs["candidate_embeddings"][:, :width]).to(user.dtype)
        logits = self._multitask_module(user * item).float()
        binary = sum(task.kind == "binary" for task in self.config.tasks)
        if binary == logits.shape[1]:
            return torch.sigmoid(logits)
        if not binary:
            return logits
        return torch.cat([torch.sigmoid(logits[:, :binary]), logits[:, binary:]], dim=1)


def cast_to(model: Module, dtype: torch.dtype) -> Module:
    """Casts weights to the compute dtype.

    Norms, position and time tables and time constants stay in fp32, fp8 modules as they are.
    """
    keep = (
        "norm", "_position_embeddings", "_timestamp_embeddings", "_period_units", "_units_per_period",
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(owner, LayerNorm | Fp8Linear | Fp8Tokens) and not any(
            word in name.rpartition(".")[2] for word in keep
        ):
            parameter.data = parameter.data.to(dtype)
    return model
