"""The onnxruntime builder: the model folder's ONNX files are the engines; it proves that each loads."""

from __future__ import annotations

import time
from pathlib import Path

import onnxruntime

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model_folder import REGENERATE, ModelFolder
from hstu_trt.engines.builders import BuiltStage
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.engines.stages import engine_stages


class OnnxRuntimeBuilder:
    """Writes no engine of its own: a copy of the tables may not fit, and ONNX refuses linked external data."""

    name = "onnxruntime"

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__}

    def build(self, model: ModelFolder, out: Path) -> tuple[list[BuiltStage], list[str]]:
        return [_load_once(model, stage) for stage in engine_stages(model)], []


def _load_once(model: ModelFolder, stage: str) -> BuiltStage:
    path = model.onnx(stage)
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; make it again with: {REGENERATE.format(folder=model.path)}")
    started = time.perf_counter()
    with OnnxRuntimeRunner(model, stage):
        load_s = time.perf_counter() - started
    return BuiltStage(stage=stage, file=str(path), bytes=path.stat().st_size, load_s=round(load_s, 3))
