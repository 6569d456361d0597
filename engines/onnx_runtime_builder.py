"""The onnxruntime builder: the ONNX files are the engines; it proves that each loads, and links them together."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from pathlib import Path

import onnxruntime

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model_folder import REGENERATE, TABLES_FOLDER, ModelFolder
from hstu_trt.engines.builders import BuiltStage
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.engines.stages import engine_stages


class OnnxRuntimeBuilder:
    """Makes a self-contained folder of ONNX files and their external data; hard links cost no disk."""

    name = "onnxruntime"

    def versions(self) -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__}

    def build(self, model: ModelFolder, out: Path) -> tuple[list[BuiltStage], list[str]]:
        for stage in engine_stages(model):
            if not model.onnx(stage).is_file():
                remedy = REGENERATE.format(folder=model.path)
                raise ArtefactError(f"{model.onnx(stage)} is missing; make it again with: {remedy}")
        top = sorted(path.name for path in model.path.iterdir() if path.suffix in (".onnx", ".safetensors"))
        tables = _files_below(model.tables, model.path)
        for file in (*top, *tables):
            link_or_copy(model.path / file, out / file)
        placed = dataclasses.replace(model, path=out)
        # The shards stand in the manifest of their own folder, which need not hash a terabyte a second time.
        listed = [file for file in tables if file == f"{TABLES_FOLDER}/manifest.json"]
        return [_load_once(placed, stage) for stage in engine_stages(model)], [*top, *listed]


def _files_below(folder: Path, base: Path) -> list[str]:
    return sorted(str(path.relative_to(base)) for path in folder.rglob("*") if path.is_file())


def _load_once(model: ModelFolder, stage: str) -> BuiltStage:
    started = time.perf_counter()
    with OnnxRuntimeRunner(model, stage):
        load_s = time.perf_counter() - started
    path = model.onnx(stage)
    return BuiltStage(stage=stage, file=path.name, bytes=path.stat().st_size, load_s=round(load_s, 3))


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the two lie on different file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
