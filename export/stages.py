"""The stages of a model as modules with positional tensors, in the order of their contract specs.

One module per ONNX file; the torch runner executes the same modules eagerly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hstu_trt.contract.model import HstuConfig, TableConfig
from hstu_trt.contract.tensors import StageSpec
from hstu_trt.export.model import DlrmHstu

TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "int32": torch.int32,
    "int64": torch.int64,
}


class Stage(nn.Module):
    """Takes the inputs of ``spec`` by position and returns its outputs as a tuple."""

    def __init__(self, spec: StageSpec) -> None:
        super().__init__()
        self.spec = spec

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Positional inputs by name."""
        return {spec.name: tensor for spec, tensor in zip(self.spec.inputs, tensors, strict=True)}


class EmbeddingStage(Stage):
    """Ids [tokens, features] -> table rows side by side [tokens, features * E]."""

    def __init__(self, spec: StageSpec, config: HstuConfig, tables: Mapping[str, Tensor], dtype: str) -> None:
        super().__init__(spec)
        self.config = config
        self.output_dtype = TORCH_DTYPES[dtype]
        for table in config.tables:
            self.register_buffer(f"table_{table.name}", tables[table.name], persistent=False)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.look_up(self.named(tensors)).values())

    def look_up(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The rows of history, candidates and contextual slots, by tensor name."""
        features = {"uih": self.config.uih_features, "candidate": self.config.candidate_features}
        if self.config.contextual_slots:
            features["contextual"] = self.config.contextual_slots
        return {f"{group}_embeddings": self._rows(inputs[f"{group}_ids"], names) for group, names in features.items()}

    def _rows(self, ids: Tensor, features: Sequence[str]) -> Tensor:
        columns = [self._lookup(ids[:, n], self.config.table_of(name)) for n, name in enumerate(features)]
        return torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]

    def _lookup(self, ids: Tensor, table: TableConfig) -> Tensor:
        weight = getattr(self, f"table_{table.name}")
        return torch.ops.hstu_trt.embedding_lookup(ids, weight, table.name, self.output_dtype)


class HstuStage(Stage):
    """Rows, timestamps and actions -> user vectors; with ``taps`` also every layer's output, all rows computed."""

    def __init__(self, spec: StageSpec, model: DlrmHstu, taps: bool = False) -> None:
        super().__init__(spec)
        self.model = model
        self.taps = taps

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        collected: list[Tensor] | None = [] if self.taps else None
        vectors = self.model.hstu_stage(self.named(tensors), collected)
        return (vectors, *(collected or ()))


class HeadStage(Stage):
    """User vectors and candidate rows -> scores."""

    def __init__(self, spec: StageSpec, model: DlrmHstu) -> None:
        super().__init__(spec)
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return (self.model.head_stage(self.named(tensors)),)


class FusedStage(Stage):
    """Flat ids -> scores: the three stages in one."""

    def __init__(self, spec: StageSpec, embedding: EmbeddingStage, model: DlrmHstu) -> None:
        super().__init__(spec)
        self.embedding = embedding
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = self.named(tensors)
        config = self.model.config
        ids = {
            "uih_ids": inputs["uih_ids"].reshape(-1, len(config.uih_features)),
            "candidate_ids": inputs["candidate_ids"].reshape(-1, len(config.candidate_features)),
        }
        rows = self.embedding.look_up({**inputs, **ids})
        vectors = self.model.hstu_stage({**inputs, **rows})
        return (self.model.head_stage({**rows, "user_embeddings": vectors}),)
