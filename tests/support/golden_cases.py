"""Golden cases of the reference, and the conversion between its token order and ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from hstu_trt.contract.config_json import load_config
from hstu_trt.contract.features import Jagged, batch_max_norm, pack_request
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.export.checkpoint import Checkpoint, load_checkpoint
from hstu_trt.export.sources import table_hints
from hstu_trt.export.stages import EmbeddingStage
from hstu_trt.export.weights import resolve_tables

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class GoldenCase:
    """A reference run: config with tables, weights, packed request with N, expected outputs."""

    config: HstuConfig
    checkpoint: Checkpoint
    request: dict[str, np.ndarray]
    outputs: dict[str, Tensor]

    def split(self, x: Tensor) -> Tensor:
        """Rows in the reference's order (user by user) -> ours (all prefixes, then all candidates)."""
        prefix, candidates = self.lengths()
        return to_split(x, prefix + candidates, candidates)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Prefix and candidate lengths per user."""
        history = torch.from_numpy(np.diff(self.request["uih_offsets"])).long()
        return history + len(self.config.contextual_slots), torch.from_numpy(
            np.diff(self.request["candidate_offsets"])
        ).long()


def to_split(x: Tensor, lengths: Tensor, candidates: Tensor) -> Tensor:
    """Jagged rows per user [prefix | candidates] -> [all prefixes | all candidates]."""
    users = x.split(lengths.tolist())
    counts = candidates.tolist()
    heads = [rows[: len(rows) - n] for rows, n in zip(users, counts, strict=True)]
    return torch.cat(heads + [rows[len(rows) - n :] for rows, n in zip(users, counts, strict=True)])


def offsets(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()


def load_case(name: str, weights: str = "state_dict.safetensors") -> GoldenCase:
    folder = GOLDEN / name
    checkpoint = load_checkpoint(folder / weights)
    config = load_config(folder / "config.json")
    assert isinstance(config, HstuConfig)
    config = resolve_tables(config, checkpoint.tables, table_hints(folder / "config.json"))
    inputs = load_file(folder / "inputs.safetensors")
    request = pack_request(config, _features(inputs, "uih"), _features(inputs, "cand"))
    request["attention_norm"] = np.array([batch_max_norm(config, request)], dtype=np.float32)
    return GoldenCase(config, checkpoint, request, load_file(folder / "outputs.safetensors"))


def _features(inputs: dict[str, Tensor], side: str) -> dict[str, Jagged]:
    names = {key.split(".")[1] for key in inputs if key.startswith(f"{side}.") and key.count(".") == 2}
    return {
        name: Jagged.of(name, inputs[f"{side}.{name}.values"].numpy(), inputs[f"{side}.{name}.lengths"].numpy())
        for name in names
    }


def readme(case: str) -> dict:
    return json.loads((GOLDEN / case / "README.json").read_text())


def assert_close(name: str, actual: Tensor, expected: Tensor, stage: str, precision: str = "fp32") -> None:
    report = compare(name, actual.numpy(), expected.numpy())
    assert report.passes(TOLERANCES[stage, precision]), report.text()


def embed(case: GoldenCase, dtype: str = "float32") -> dict[str, Tensor]:
    """The request with its embedding rows looked up."""
    tables = {name: torch.from_numpy(np.concatenate(list(t.blocks()))) for name, t in case.checkpoint.tables.items()}
    inputs = {name: torch.from_numpy(value) for name, value in case.request.items()}
    stage = EmbeddingStage(None, case.config, tables, dtype)
    return inputs | stage.look_up(inputs)
