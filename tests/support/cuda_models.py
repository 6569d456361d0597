"""Models of the cuda runner from golden cases, and feeds of its fused stage."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from fp8_models import golden_fp8
from golden_cases import GoldenCase
from numpy.typing import NDArray

import hstu_trt.export.torch_ops  # noqa: F401 - attention without a GPU
from hstu_trt.contract.fp8_plan import layer_sites
from hstu_trt.contract.tensors import default_limits
from hstu_trt.engines.cuda.runner import CudaModel, CudaOptions, FusedRunner


def cuda_model(case: GoldenCase, precision: str, options: CudaOptions) -> CudaModel:
    """A golden case on the device of the options; in fp8 its attention layers are."""
    dense = case.checkpoint.dense
    if precision == "fp8":
        dense = golden_fp8(case, layer_sites(case.config)).state_dict()
    rows = {name: np.concatenate(list(t.blocks())) for name, t in case.checkpoint.tables.items()}
    tables = {name: torch.from_numpy(table).to(options.device) for name, table in rows.items()}
    return CudaModel(case.config, dense, precision, tables, options)  # type: ignore[arg-type]


def fused_runner(case: GoldenCase, precision: str, options: CudaOptions) -> FusedRunner:
    return FusedRunner(cuda_model(case, precision, options), default_limits(case.config))


def fused_feed(request: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """A packed request with its ids laid end to end."""
    return {**request, **{name: request[name].reshape(-1) for name in ("uih_ids", "candidate_ids")}}
