"""A Triton Python model that serves PyTorch eager: what people deploy who have a model and no pipeline.

It takes the inputs of ``ranking`` and runs the whole model, tables included, on each request. Runs inside tritonserver
only, from the repository that ``eager_repository`` writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from hstu_trt.contract.errors import InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.tensors import FUSED
from hstu_trt.export.torch_runner import TorchRunner


class EagerModel:
    """One request at a time through ``TorchRunner``, with the threads that its config names, or PyTorch's own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called once by Triton."""
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        model = read_model_folder(Path(parameters["model_folder"]), verify=False)
        self._inputs = [port["name"] for port in config["input"]]
        self._norm = np.asarray([float(parameters["attention_norm"])], dtype=np.float32)
        self._runner = TorchRunner(
            model, FUSED, threads=int(parameters["threads"]) if "threads" in parameters else None
        )
        self._flat = [spec.name for spec in self._runner.spec.inputs if len(spec.dims) == 1]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
        feed |= {name: feed[name].reshape(-1) for name in self._flat if name in feed}
        try:
            scores = self._runner.infer({**feed, "attention_norm": self._norm})["preds"]
        except InputError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        return pb_utils.InferenceResponse([pb_utils.Tensor("preds", scores)])
