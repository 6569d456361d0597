"""fp8 models of golden cases and of configs with random weights, without ONNX."""

from __future__ import annotations

import copy

import numpy as np
import torch
from golden_cases import GoldenCase
from torch import Tensor, nn

from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.split_users import one_user_feeds
from hstu_trt.contract.tensors import default_limits
from hstu_trt.export.build import build_ranking_model
from hstu_trt.export.calibration import largest_values, requests_with_norm, synthetic_requests
from hstu_trt.export.checkpoint import Checkpoint
from hstu_trt.export.model import DlrmHstu
from hstu_trt.export.quantise import fp8_modules, put_fp8
from hstu_trt.export.stages import EmbeddingStage


def lookup_stage(config: HstuConfig, checkpoint: Checkpoint, dtype: str = "float32") -> EmbeddingStage:
    tables = {name: torch.from_numpy(np.concatenate(list(t.blocks()))) for name, t in checkpoint.tables.items()}
    return EmbeddingStage(None, config, tables, dtype)


# Calibrations by config and weights: several tests look at one model.
_MADE: dict[tuple[HstuConfig, str], dict[str, dict[str, nn.Module]]] = {}


def fp8_model(config: HstuConfig, checkpoint: Checkpoint, sites: tuple[str, ...]) -> DlrmHstu:
    """The model with some parts in fp8 and the rest in fp16, calibrated on made-up requests."""
    key = (config, checkpoint.source)
    if key not in _MADE:
        reference = build_ranking_model(config, checkpoint.dense, "test", "fp32")
        requests = requests_with_norm(config, synthetic_requests(config, default_limits(config), 32), None)
        largest = largest_values(reference, lookup_stage(config, checkpoint), one_user_feeds(requests))
        _MADE[key] = fp8_modules(reference, largest)
    half = build_ranking_model(config, checkpoint.dense, "test", "fp16")
    return put_fp8(half, sites, copy.deepcopy(_MADE[key]))


def golden_fp8(case: GoldenCase, sites: tuple[str, ...]) -> DlrmHstu:
    return fp8_model(case.config, case.checkpoint, sites)


def run(model: DlrmHstu, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """(outputs of the layers, user embeddings, scores), all on the CPU in fp32."""
    taps: list[Tensor] = []
    with torch.inference_mode():
        model.hstu_stage(inputs, taps)
        vectors = model.hstu_stage(inputs)
        scores = model.head_stage({**inputs, "user_embeddings": vectors})
    return [tap.float().cpu() for tap in taps], vectors.float().cpu(), scores.float().cpu()
