"""Models with weights, ready to run: all that scoring in PyTorch needs of this room, without ONNX."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import AnyConfig, HstuConfig, ResearchHstuConfig
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.tensors import Precision, float_dtype
from hstu_trt.export.model import DlrmHstu, cast_to
from hstu_trt.export.quantise import put_empty_fp8
from hstu_trt.export.research import ITEM_TABLE_KEY, MASK_BUFFER, ResearchHstu
from hstu_trt.export.stages import TORCH_DTYPES
from hstu_trt.export.weights import check_fit, load_dense


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
    return load_dense(ResearchHstu(config), _of_research_model(dense), source).eval()


def check_weights(config: AnyConfig, dense: Mapping[str, Tensor], source: str) -> None:
    """Holds the keys and shapes of dense weights against a config's, before anything takes memory, disk or time.

    Raises ArtefactError with a readable diff, ConfigError for widths that no tensor can have.
    """
    try:
        with torch.device("meta"):
            model = DlrmHstu(config) if isinstance(config, HstuConfig) else ResearchHstu(config)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"the config's widths make tensors that PyTorch cannot hold ({reason})") from None
    check_fit(model.state_dict(), dense if isinstance(config, HstuConfig) else _of_research_model(dense), source)


def _of_research_model(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in dense.items() if key not in (MASK_BUFFER, ITEM_TABLE_KEY)}


def dense_weights(model: ModelFolder) -> dict[str, Tensor]:
    """The dense weights of an exported model, by the checkpoint's keys."""
    from safetensors.torch import load_file

    # What tracing made (folded constants) is in the file too; its names begin with a stage's.
    return {key: value for key, value in load_file(model.weights).items() if key.startswith("_")}
