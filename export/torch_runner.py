"""The PyTorch model behind the Runner interface: what every engine is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import TAPS, ModelFolder
from hstu_trt.contract.split_users import ATTENTION_STAGES, infer_per_user
from hstu_trt.contract.tensors import FUSED, RESEARCH_STAGE, float_dtype
from hstu_trt.export.build import build_ranking_model, build_research_model, dense_weights
from hstu_trt.export.research import ITEM_TABLE, SequenceEncoderStage
from hstu_trt.export.stages import EmbeddingStage, FusedStage, HeadStage, HstuStage, Stage
from hstu_trt.export.tables import table_rows


class TorchRunner:
    """Runs one stage of a model folder in PyTorch, in the folder's precision.

    threads: PyTorch's intra-op threads are a setting of the process; ``None`` leaves it alone.
    device: where it runs, as PyTorch names it. On a CPU the users of a batch run one by one (``split_users``), so that
    a user's scores have the same bits in any company.
    """

    def __init__(self, model: ModelFolder, stage: str, *, threads: int | None = None, device: str = "cpu") -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"device {device!r}: PyTorch sees no CUDA GPU here")
        self._device = torch.device(device)
        self._module = _stage(model, stage).to(self._device)
        self._splits = self._device.type == "cpu" and stage in ATTENTION_STAGES
        self._slots = len(model.ranking_config.contextual_slots) if self._splits else 0
        self.spec = model.specs["hstu" if stage == TAPS else stage]
        self._outputs = [spec.name for spec in self.spec.outputs]
        if stage == TAPS:
            self._outputs += [f"stu.{layer}.out" for layer in range(model.ranking_config.layers)]

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def infer(self, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Runs the stage on numpy arrays: inputs by name -> outputs by name."""
        missing = [spec.name for spec in self.spec.inputs if spec.name not in feed]
        if missing:
            raise InputError(f"stage {self.spec.name}: inputs {', '.join(missing)} are missing")
        known = {spec.name: feed[spec.name] for spec in self.spec.inputs}
        return infer_per_user(self._run, known, self._slots) if self._splits else self._run(known)

    def _run(self, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        arrays = [np.ascontiguousarray(feed[spec.name]) for spec in self.spec.inputs]
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        with torch.inference_mode():
            outputs = self._module(*tensors)
        return {name: output.cpu().numpy() for name, output in zip(self._outputs, outputs, strict=True)}


def _stage(model: ModelFolder, name: str) -> Stage:
    dense = dense_weights(model)
    source = str(model.weights)
    if not isinstance(model.config, HstuConfig):
        encoder = build_research_model(model.config, dense, source)
        return SequenceEncoderStage(model.specs[RESEARCH_STAGE], encoder, table_rows(model.tables)[ITEM_TABLE])
    spec = model.specs["hstu" if name == TAPS else name]
    if name == "embedding_lookup":
        return _embedding_stage(model)
    network = build_ranking_model(model.config, dense, source, model.precision, model.fp8_sites)
    if name == FUSED:
        return FusedStage(spec, _embedding_stage(model), network)
    if name == "mlp_head":
        return HeadStage(spec, network)
    return HstuStage(spec, network, taps=name == TAPS)


def _embedding_stage(model: ModelFolder) -> EmbeddingStage:
    spec = model.specs["embedding_lookup"]
    return EmbeddingStage(spec, model.ranking_config, table_rows(model.tables), float_dtype(model.precision))
