"""What the Python models of a deployment share: parameters, runners, refreshes, metrics, and the form of an error.

Runs inside tritonserver only, which provides ``triton_python_backend_utils``. A bad request answers INVALID_ARGUMENT
and leaves its batch mates alone; anything unexpected answers INTERNAL and is logged with its traceback.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import ConfigError, DeviceMemoryError, HstuTrtError, InputError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.runner import Runner
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.serving.deployment import run_folder_of_model
from hstu_trt.serving.engine_steps import ENGINES_PARAMETER
from hstu_trt.serving.models.front_door import FrontDoor, SizeOf
from hstu_trt.serving.models.held import Board
from hstu_trt.serving.models.live_metrics import LiveMetrics
from hstu_trt.serving.models.live_models import Place, serves
from hstu_trt.serving.models.live_stages import DenseLostError, Tally
from hstu_trt.serving.models.stages import RequestError, RunnerStage, Stage
from hstu_trt.serving.models.waiting_room import queue_places
from hstu_trt.serving.refresh.releases import Release, ReleaseFolder
from hstu_trt.serving.refresh.settings import positive_seconds, refresh_mode, takes_previous
from hstu_trt.serving.refresh.watching import Refresh, Watcher
from hstu_trt.serving.served import LOOKUP_MODELS
from hstu_trt.serving.signature import (
    ATTENTION_NORM,
    OUT_OF_REACH,
    QUEUE_PARAMETER,
    TIERS_PARAMETER,
)
from hstu_trt.serving.supervision.events import MOST_ID_CHARS, Events
from hstu_trt.tables.ids import POLICIES, Policy
from hstu_trt.tables.live import Live
from hstu_trt.tables.refresh import RefreshOptions, VersionOpener
from hstu_trt.tables.remote_resp import RowsOutOfReachError
from hstu_trt.tables.tier_settings import TierSettings, read_tier_settings
from hstu_trt.tables.tiers import Tiers

_SWITCH_S = 0.0005


class TritonModel:
    """What the models share: their parameters, the model folder, and the form of an error."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called once by Triton; ``args`` holds the model's name, folder and config as strings."""
        # A request must not wait 5 ms, Python's default, for each turn of the thread that opens the next version.
        sys.setswitchinterval(_SWITCH_S)
        self._name = args["model_name"]
        self._folder = Path(args["model_repository"])
        config = json.loads(args["model_config"])
        self._parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._max_batch = max(1, int(config["max_batch_size"]))
        self._inputs = [port["name"] for port in config["input"]]
        self._run = run_folder_of_model(self._folder)
        self._events = Events(self._run, self._name)
        self._opened = ExitStack()
        self._live: Live[Any] | None = None
        self._tally: Tally | None = None
        self._metrics: LiveMetrics | None = None
        self._door: FrontDoor | None = None
        self._shown: Release | None = None
        self._tiers: Tiers | None = None
        self._trouble = ""
        try:
            # ``serve`` has verified its files before the launch.
            self._load(read_model_folder((self._folder / self._parameter("model_folder")).resolve(), verify=False))
        except HstuTrtError as error:
            raise pb_utils.TritonModelException(f"{self._name}: {error}") from None
        # What is there now stays: a collection of garbage that looked through it all would stop a request for 0.1 s.
        gc.collect()
        gc.freeze()

    def _load(self, model: ModelFolder) -> None:
        raise NotImplementedError

    def finalize(self) -> None:
        """Called by Triton when the model is unloaded."""
        self._opened.close()

    def _runner(self, model: ModelFolder, stage: str) -> Runner:
        """The runner of a stage: the engine's, where the config names one."""
        if ENGINES_PARAMETER in self._parameters:
            from hstu_trt.engines.tensorrt_runner import TensorRtRunner

            engines = (self._folder / self._parameters[ENGINES_PARAMETER]).resolve()
            return self._opened.enter_context(TensorRtRunner(engines, stage, model))
        return OnnxRuntimeRunner.for_serving(model, stage)

    def _open_door(
        self, answer: Callable[[Sequence[Any]], list[Any]], size: SizeOf, before: Callable[[], None] = lambda: None
    ) -> FrontDoor:
        """Where requests wait, or are refused."""
        places = queue_places(self._parameter(QUEUE_PARAMETER))
        self._door = FrontDoor(answer, size, places=places, most_at_once=self._max_batch, before=before)
        self._opened.callback(self._door.close)
        return self._door

    def _open_step(self, model: ModelFolder, step: str) -> Stage:
        """``hstu`` or ``mlp_head`` of a dense model, with the deployment's attention norm."""
        runner = self._runner(model, step)
        needs_norm = any(spec.name == ATTENTION_NORM for spec in runner.spec.inputs)
        return RunnerStage(runner, parse_fixed_norm(self._parameter(ATTENTION_NORM)) if needs_norm else None)

    def _place(self, model: ModelFolder, every_poll: Callable[[], None] = lambda: None) -> Place:
        """Where versions are published for this deployment."""
        place = Place.of_server(
            self._run,
            name=self._name,
            folder=ReleaseFolder(
                (self._folder / self._parameter("versions_folder")).resolve(),
                model,
                or_previous=takes_previous(self._parameter("bad_version")),
            ),
            poll_s=positive_seconds(self._parameter("refresh_poll_seconds")),
            tell=self._tell,
            every_poll=every_poll,
        )
        self._opened.callback(place.board.remove, self._name)
        return place

    def _opener(self) -> VersionOpener:
        """How versions of the tables are opened."""
        budget = self._parameters.get("refresh_memory_bytes")
        options = RefreshOptions(
            mode=refresh_mode(self._parameter("refresh")),
            memory_budget=None if budget is None else int(budget),
            processes=sum(self._is_served(name) for name in LOOKUP_MODELS),
        )
        named = self._parameters.get(TIERS_PARAMETER)
        tiers = Tiers(TierSettings() if named is None else read_tier_settings((self._folder / named).resolve()))
        self._opened.callback(tiers.close)
        self._tiers = tiers if tiers.has_remotes else None
        return VersionOpener(
            open_tables=tiers.open_tables, memory_of=tiers.memory_of, may_lack=tiers.may_lack_files, options=options
        )

    def _watch(self, watcher: Watcher) -> None:
        self._update()
        watcher.start()
        self._opened.callback(watcher.stop)

    def _tell(self, refresh: Refresh) -> None:
        """Logs and counts a refresh; a refusal as an error, since somebody has to act."""
        told = {"version": refresh.version, "seconds": round(refresh.seconds, 3), "refused": refresh.refused}
        self._events.write("refresh", result="ok" if refresh.refused is None else "refused", **told)
        if refresh.refused is None:
            pb_utils.Logger.log_info(f"{self._name}: serves {refresh.version} after {refresh.seconds:.2f} s")
        else:
            pb_utils.Logger.log_error(
                f"{self._name}: refused {refresh.version}, and goes on as before: {refresh.refused}"
            )
        if self._metrics is not None:
            self._metrics.refreshed(refresh)

    def _update(self) -> None:
        """Brings the metrics up to date and frees what nobody reads any more."""
        if self._live is None or self._tally is None:
            return
        draining = self._live.sweep()
        if self._metrics is None:
            self._metrics = self._own_metrics()
        self._metrics.update(self._tally, draining)
        if self._door is not None:
            self._metrics.load(self._door.take_counts())
        if self._tiers is not None:
            self._metrics.remote(self._tiers.counters(), self._tiers.troubles())
        if self._trouble:
            pb_utils.Logger.log_warn(f"{self._name}: {self._trouble}")
            self._trouble = ""
        release = self._live.current
        if release is not self._shown:
            self._shown = release
            self._metrics.in_use(serves(release))

    def _own_metrics(self) -> LiveMetrics:
        """Of the models of a server, the first that looks rows up tells how often it was restarted."""
        tells = self._name == next(filter(self._is_served, LOOKUP_MODELS))
        return LiveMetrics(self._name, Board(self._run, os.getppid()) if tells else None)

    def _is_served(self, name: str) -> bool:
        """Whether this server's repository holds a model: it holds what is served (``served.py``)."""
        return (self._folder.parent / name).is_dir()

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

    def _refusal(self, error: RequestError | DenseLostError, request: Any) -> Any:
        """INVALID_ARGUMENT for a wrong request, UNAVAILABLE where rows or weights for a right one are out of reach.

        Which node or folder failed, and how, is not the client's business: the log tells, once per poll.
        """
        if isinstance(error, InputError):
            self._events.request(request.request_id(), "INVALID_ARGUMENT", str(error))
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        self._trouble = str(error)
        self._events.request(request.request_id(), "UNAVAILABLE", str(error))
        text = error.text if isinstance(error, RowsOutOfReachError) else "see the server's log"
        return pb_utils.InferenceResponse(
            error=pb_utils.TritonError(OUT_OF_REACH + text, pb_utils.TritonError.UNAVAILABLE)
        )

    def _failure(self, error: Exception, request: Any) -> Any:
        # An id is the client's: as a literal, so that it cannot look like another line of the log.
        place = f"{self._name} [request {request.request_id()[:MOST_ID_CHARS]!r}]"
        if isinstance(error, DeviceMemoryError):
            pb_utils.Logger.log_error(f"{place}: {error}")
            text = f"model {self._name!r} has not enough GPU memory for this request now; send a smaller one, or later"
            self._events.request(request.request_id(), "UNAVAILABLE", text)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.UNAVAILABLE))
        pb_utils.Logger.log_error(f"{place}: {''.join(traceback.format_exception(error))}")
        text = f"model {self._name!r} failed: {type(error).__name__}: {error}"
        self._events.request(request.request_id(), "INTERNAL", text)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, pb_utils.TritonError.INTERNAL))
