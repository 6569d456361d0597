"""The onnxruntime builder: the model folder's ONNX files are the engines; it proves that each loads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import onnxruntime

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.model_folder import REGENERATE, ModelFolder
from hstu_trt.engines.builders import BuildRequest, BuiltStage
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.engines.stages import engine_stages


class OnnxRuntimeBuilder:
    """Writes no engine of its own: a copy of the tables may not fit, and ONNX refuses linked external data."""

    name = "onnxruntime"

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__}

    def check(self, request: BuildRequest) -> None:
        given = [name for name in request.options.facts() if name != "stages"]
        if given:
            raise ConfigError(f"builder onnxruntime has no such options: {', '.join(given)}; they are for TensorRT")

    def check_machine(self, request: BuildRequest) -> None:
        """Every machine will do."""

    def facts(self, request: BuildRequest) -> dict[str, Any]:
        return {}

    def build(self, request: BuildRequest, out: Path, *, force: bool) -> tuple[list[BuiltStage], list[str]]:
        return [_load_once(request.model, stage) for stage in request.chosen_stages(engine_stages(request.model))], []


def _load_once(model: ModelFolder, stage: str) -> BuiltStage:
    path = model.onnx(stage)
    if not path.is_file():
        raise ArtefactError(f"{path} is missing; make it again with: {REGENERATE.format(folder=model.path)}")
    started = time.perf_counter()
    with OnnxRuntimeRunner(model, stage):
        seconds = time.perf_counter() - started
    return BuiltStage(stage=stage, file=str(path), bytes=path.stat().st_size, seconds=round(seconds, 3))
