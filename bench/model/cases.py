"""What `bench model` measures: models with seeded weights and full-size tables made on the GPU, and their requests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu_trt.bench.workloads.generate import generate
from hstu_trt.bench.workloads.lengths import ConstLengths
from hstu_trt.bench.workloads.profiles import PROFILES, Profile
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.features import Tensors, pack_request
from hstu_trt.contract.fp8_plan import layer_sites
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.presets import dlrm_v3
from hstu_trt.contract.tensors import Limits, Precision, default_limits
from hstu_trt.export.build import build_ranking_model
from hstu_trt.export.calibration import largest_values, requests_with_norm, synthetic_requests
from hstu_trt.export.quantise import fp8_modules, put_fp8
from hstu_trt.export.stages import EmbeddingStage
from hstu_trt.export.weights import random_checkpoint

ITEM_ROWS, USER_ROWS = 8_000_000, 1_000_000
_SMALL_ROWS = 4096
_CALIBRATION_REQUESTS = 16
_TABLE_BLOCK = 1 << 20
SEED = 1001


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """A model under a law of lengths."""

    name: str
    config: HstuConfig
    profile: Profile

    @property
    def limits(self) -> Limits:
        """What the runner is opened for."""
        return default_limits(self.config)


def dlrm_v3_on_one_gpu() -> HstuConfig:
    """dlrm_v3 with tables that fit one GPU: 8M items and 1M users, 512 wide in fp16."""
    rows = {"item_id": ITEM_ROWS, "user_id": USER_ROWS}
    config = dlrm_v3()
    tables = tuple(dataclasses.replace(t, rows=rows.get(t.name, t.rows)) for t in config.tables)
    return dataclasses.replace(config, tables=tables)


def largest_of_the_literature() -> HstuConfig:
    """24 layers, width 1,024 (8 heads of 128), for histories of 8,192 events."""
    return dataclasses.replace(dlrm_v3_on_one_gpu(), layers=24, model_dim=1024, heads=8)


def cases() -> dict[str, ModelCase]:
    """The cases by name."""
    small = dlrm_v3_on_one_gpu()
    stream, ecommerce = (PROFILES[name]() for name in ("gpu_mlperf", "gpu_ecom"))
    long = dataclasses.replace(PROFILES["gpu_point"](), lengths=ConstLengths(value=8192))
    found = (
        ModelCase(name="dlrm_v3 stream", config=small, profile=stream),
        ModelCase(name="dlrm_v3 ecommerce", config=small, profile=dataclasses.replace(ecommerce, candidates=(2048,))),
        ModelCase(name="24 layers 8192", config=largest_of_the_literature(), profile=long),
    )
    return {case.name: case for case in found}


def select_cases(names: list[str]) -> list[ModelCase]:
    """Cases by name. Raises ConfigError."""
    known = cases()
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown case {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of a model folder's weights.safetensors, without the folder."""

    precision: Precision
    dense: Mapping[str, Tensor]
    fp8_sites: tuple[str, ...] = ()


class RandomModel:
    """One model with seeded weights, in any precision; fp8 is calibrated on made-up requests."""

    def __init__(self, config: HstuConfig, *, heavy_tailed: bool = False) -> None:
        tables = tuple(dataclasses.replace(t, rows=min(t.rows, _SMALL_ROWS)) for t in config.tables)
        self._config = dataclasses.replace(config, tables=tables)
        self._checkpoint = random_checkpoint(self._config, SEED, heavy_tailed=heavy_tailed)

    def weights(self, precision: Precision, sites: tuple[str, ...] | None = None) -> Weights:
        """sites: the parts in fp8; None: the attention layers."""
        if precision != "fp8":
            return Weights(precision=precision, dense=self._checkpoint.dense)
        sites = layer_sites(self._config) if sites is None else sites
        half = build_ranking_model(self._config, self._checkpoint.dense, "random", "fp16")
        quantised = put_fp8(half, sites, self._fp8_modules)
        return Weights(precision=precision, dense=quantised.state_dict(), fp8_sites=sites)

    @functools.cached_property
    def _fp8_modules(self) -> Any:
        config, checkpoint = self._config, self._checkpoint
        rows = {name: torch.from_numpy(np.concatenate(list(t.blocks()))) for name, t in checkpoint.tables.items()}
        reference = build_ranking_model(config, checkpoint.dense, "random", "fp32")
        lookup = EmbeddingStage(None, config, rows, "float32")  # type: ignore[arg-type]
        requests = synthetic_requests(config, default_limits(config), _CALIBRATION_REQUESTS)
        largest = largest_values(reference, lookup, [requests_with_norm(config, requests, float(config.max_seq_len))])
        return fp8_modules(reference, largest)


def random_weights(config: HstuConfig, precisions: list[Precision]) -> dict[Precision, Weights]:
    """One model with seeded weights in several precisions; fp8 in the layers."""
    model = RandomModel(config)
    return {precision: model.weights(precision) for precision in precisions}


def device_tables(config: HstuConfig, device: torch.device) -> dict[str, Tensor]:
    """Seeded Gaussian rows of each table, made on the device."""
    tables = {}
    for number, table in enumerate(config.tables):
        generator = torch.Generator(device).manual_seed(SEED + number)
        rows = torch.empty((table.rows, table.dim), dtype=torch.float16, device=device)
        for block in rows.split(_TABLE_BLOCK):
            block.normal_(generator=generator)
        tables[table.name] = rows
    return tables


def requests(case: ModelCase, count: int) -> list[Tensors]:
    """Feeds of the ``ranking_fused`` stage, one user each."""
    profile = dataclasses.replace(case.profile, requests=count, users=min(case.profile.users, 8 * count))
    workload = generate(profile, case.config, seed=SEED, limits=case.limits)
    norm = np.array([case.config.max_seq_len], dtype=np.float32)
    feeds = []
    for row in range(len(workload)):
        packed = pack_request(case.config, *workload.features(case.config, row))
        flat = {name: packed[name].reshape(-1) for name in ("uih_ids", "candidate_ids")}
        feeds.append({**packed, **flat, "attention_norm": norm})
    return feeds
