"""The Python models of a deployment: Triton's requests in and out of ``stages``.

In the flavour ``tensorrt``, ``hstu`` and ``mlp_head`` are plans and not among them. Runs inside tritonserver only,
which provides ``triton_python_backend_utils``. A bad request answers INVALID_ARGUMENT and leaves its batch mates alone;
anything unexpected answers INTERNAL and is logged with its traceback.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import ConfigError, HstuTrtError, InputError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.runner import Runner
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.serving.engine_steps import ENGINES_PARAMETER
from hstu_trt.serving.signature import ATTENTION_NORM
from hstu_trt.serving.stages import FusedStage, GuardedLookup, RunnerStage, Stage
from hstu_trt.tables.ids import POLICIES, Policy
from hstu_trt.tables.lookup_stage import HostLookup


class _TritonModel:
    """What the models share: their parameters, the model folder, and the form of an error."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called once by Triton; ``args`` holds the model's name, folder and config as strings."""
        self._name = args["model_name"]
        self._folder = Path(args["model_repository"])
        config = json.loads(args["model_config"])
        self._parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._inputs = [port["name"] for port in config["input"]]
        self._opened = ExitStack()
        try:
            # ``serve`` has verified its files before the launch.
            self._load(read_model_folder((self._folder / self._parameter("model_folder")).resolve(), verify=False))
        except HstuTrtError as error:
            raise pb_utils.TritonModelException(f"{self._name}: {error}") from None

    def _load(self, model: ModelFolder) -> None:
        raise NotImplementedError

    def finalize(self) -> None:
        """Called by Triton when the model is unloaded."""
        self._opened.close()

    def _runner(self, model: ModelFolder) -> Runner:
        """The runner of the stage that bears this model's name in Triton: the engine's, where the config names one."""
        if ENGINES_PARAMETER in self._parameters:
            from hstu_trt.engines.tensorrt_runner import TensorRtRunner

            engines = (self._folder / self._parameters[ENGINES_PARAMETER]).resolve()
            return self._opened.enter_context(TensorRtRunner(engines, self._name, model))
        return self._opened.enter_context(OnnxRuntimeRunner.for_serving(model, self._name))

    def _parameter(self, key: str) -> str:
        if key not in self._parameters:
            raise ConfigError(f"config.pbtxt has no parameter {key!r}; assemble the deployment again")
        return str(self._parameters[key])

    def _id_policy(self) -> Policy:
        policy = self._parameter("id_policy")
        for known in POLICIES:
            if policy == known:
                return known
        raise ConfigError(f"unknown id_policy {policy!r}: choose from {', '.join(POLICIES)}")

    def _tensors(self, request: Any) -> Tensors:
        return {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}

    @staticmethod
    def _refusal(error: InputError) -> Any:
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))

    def _failure(self, error: Exception) -> Any:
        pb_utils.Logger.log_error(f"{self._name}: {''.join(traceback.format_exception(error))}")
        text = f"model {self._name!r} failed: {type(error).__name__}: {error}"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INTERNAL))


class _StageModel(_TritonModel):
    """A model that treats each request as a batch of its own."""

    _stage: Stage

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            answer = self._stage.infer(self._tensors(request))
            return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer.items()])
        except InputError as error:
            return self._refusal(error)
        except Exception as error:  # the server must live whatever a request holds
            return self._failure(error)


class EmbeddingLookupModel(_StageModel):
    """``embedding_lookup``; with an attention norm to hand on, it checks the whole request (``GuardedLookup``)."""

    def _load(self, model: ModelFolder) -> None:
        lookup = HostLookup(model, self._id_policy())
        norm = self._parameters.get(ATTENTION_NORM)
        self._stage = lookup if norm is None else GuardedLookup(model, lookup, parse_fixed_norm(norm))


class StepModel(_StageModel):
    """``hstu`` or ``mlp_head``."""

    def _load(self, model: ModelFolder) -> None:
        runner = self._runner(model)
        needs_norm = any(spec.name == ATTENTION_NORM for spec in runner.spec.inputs)
        norm = parse_fixed_norm(self._parameter(ATTENTION_NORM)) if needs_norm else None
        self._stage = RunnerStage(runner, norm)


class FusedModel(_TritonModel):
    """``ranking_fused``: all waiting requests that Triton hands over, run as one batch."""

    def _load(self, model: ModelFolder) -> None:
        norm = parse_fixed_norm(self._parameter(ATTENTION_NORM))
        self._stage = FusedStage(model, self._runner(model), norm, self._id_policy())

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response per request, in order."""
        try:
            results = self._stage.infer_many([self._tensors(request) for request in requests])
        except Exception as error:  # the server must live whatever a request holds
            return [self._failure(error) for _ in requests]
        return [self._response(result) for result in results]

    def _response(self, result: NDArray | InputError) -> Any:
        if isinstance(result, InputError):
            return self._refusal(result)
        return pb_utils.InferenceResponse([pb_utils.Tensor("preds", result)])
