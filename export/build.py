"""Models with weights, ready to run: all that scoring in PyTorch needs of this room, without ONNX."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hstu_trt.contract.model import HstuConfig, ResearchHstuConfig
from hstu_trt.contract.tensors import Precision, float_dtype
from hstu_trt.export.model import DlrmHstu, cast_to
from hstu_trt.export.quantise import put_empty_fp8
from hstu_trt.export.research import ITEM_TABLE_KEY, MASK_BUFFER, ResearchHstu
from hstu_trt.export.stages import TORCH_DTYPES
from hstu_trt.export.weights import load_dense


def build_ranking_model(
    config: HstuConfig,
    dense: Mapping[str, Tensor],
    source: str,
    precision: Precision,
    fp8_sites: tuple[str, ...] = (),
) -> DlrmHstu:
    """The PyTorch model with weights, in evaluation mode and in the compute dtype of a precision.

    fp8_sites: parts whose weights are in e4m3 in ``dense``, with their scales.
    """
    model = DlrmHstu(config)
    put_empty_fp8(cast_to(model, TORCH_DTYPES[float_dtype(precision)]), fp8_sites)
    return load_dense(model, dense, source).eval()


def build_research_model(config: ResearchHstuConfig, dense: Mapping[str, Tensor], source: str) -> ResearchHstu:
    """The PyTorch research model with weights, in evaluation mode, fp32."""
    weights = {key: value for key, value in dense.items() if key not in (MASK_BUFFER, ITEM_TABLE_KEY)}
    return load_dense(ResearchHstu(config), weights, source).eval()
