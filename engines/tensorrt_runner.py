"""The runner of TensorRT and TensorRT-RTX engines: one class behind ``contract.runner.Runner``.

One execution context and one stream per runner, so a runner serves one thread at a time. The profile follows from the
shapes of a feed. Engines without our attention plugin are dense over a batch: there the users run one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError, ConfigError, DeviceMemoryError, HstuTrtError, InputError
from hstu_trt.contract.features import Tensors, check_request
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.split_users import ATTENTION_STAGES, infer_per_user
from hstu_trt.engines.cuda_driver import CudaDriver
from hstu_trt.engines.device_buffers import DeviceBuffers
from hstu_trt.engines.engine_folder import EngineFile, check_engine, make_context, open_engine, read_engine_file
from hstu_trt.engines.hooks import BuildLog, make_logger
from hstu_trt.engines.modules import FLAVOURS, TensorRt, open_module
from hstu_trt.engines.profiles import Shape
from hstu_trt.engines.stages import check_feed, engine_spec
from hstu_trt.engines.targets import target_of_device


class TensorRtRunner:
    """Executes one stage of an engines folder on the GPU at hand.

    engines: what ``hstu-trt engines`` made of ``model``. driver, trt: stand-ins for tests.
    Raises ConfigError without GPU or library, ArtefactError for an engine that is stale, damaged, or made for another
    GPU or version.
    """

    def __init__(
        self,
        engines: Path,
        stage: str,
        model: ModelFolder,
        *,
        driver: CudaDriver | None = None,
        trt: TensorRt | None = None,
    ) -> None:
        self.spec = engine_spec(model, stage)
        self._file: EngineFile = read_engine_file(engines, stage, model)
        self._limits = model.limits
        self._splits = stage in ATTENTION_STAGES and not self._file.has_plugins
        self._slots = len(model.ranking_config.contextual_slots) if self._splits else 0
        self._trt = trt or open_module(FLAVOURS[self._file.builder])
        self._driver = driver or CudaDriver()
        check_engine(self._file, self._trt, self._driver.device())
        self._log = BuildLog()
        self._driver.use()
        logger = make_logger(self._trt.module, self._log)
        self._runtime, self._engine = open_engine(self._trt, logger, self._file, model)
        self._check_ports()
        self._context = make_context(self._trt, self._engine, self._file, model)
        if self._context is None:
            raise HstuTrtError(f"{self._file.path}: no execution context: {self._reason()}")
        self._stream = self._driver.create_stream()
        self._buffers = DeviceBuffers(self._driver)
        self._outputs = self._make_allocator()
        self._profile: int | None = None

    def __enter__(self) -> TensorRtRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Frees the GPU's memory; the runner is of no use afterwards."""
        if self._context is None:
            return
        self._driver.use()
        self._driver.synchronize(self._stream)
        self._context = self._engine = self._runtime = None
        self._buffers.close()
        self._driver.destroy_stream(self._stream)
        self._driver.release()

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        """Runs the stage: inputs by name -> outputs by name.

        Raises InputError when the feed does not fit the stage or no profile, HstuTrtError when the engine fails.
        """
        check_feed(feed, self.spec)
        check_request(feed, self.spec, self._limits)
        self._driver.use()
        return infer_per_user(self._run, feed, self._slots) if self._splits else self._run(feed)

    def _run(self, feed: Mapping[str, NDArray]) -> Tensors:
        self._choose_profile({name: array.shape for name, array in feed.items()})
        for name, array in feed.items():
            address = self._buffers.upload(name, np.ascontiguousarray(array), self._stream)
            if not (
                self._context.set_input_shape(name, array.shape) and self._context.set_tensor_address(name, address)
            ):
                raise HstuTrtError(f"{self._file.path}: input {name} {list(array.shape)} was refused: {self._reason()}")
        for spec in self.spec.outputs:
            self._context.set_output_allocator(spec.name, self._outputs)
        self._outputs.failure = None
        if not self._context.execute_async_v3(self._stream):
            self._driver.synchronize(self._stream)  # what was enqueued before it failed still reads the buffers
            if self._outputs.failure is not None:
                raise self._outputs.failure
            raise HstuTrtError(f"{self._file.path}: the engine failed: {self._reason()}")
        staged = {
            spec.name: self._buffers.download(spec.name, self._outputs.shapes[spec.name], spec.dtype, self._stream)
            for spec in self.spec.outputs
        }
        self._driver.synchronize(self._stream)
        return {name: array.copy() for name, array in staged.items()}

    def _choose_profile(self, shapes: Mapping[str, Shape]) -> None:
        """Switches to the first profile that admits the shapes: the narrowest stands first."""
        fitting = [number for number, profile in enumerate(self._file.profiles) if profile.admits(shapes)]
        if not fitting:
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            known = "; ".join(f"{p.name}: {dict(p.dims)}" for p in self._file.profiles)
            raise InputError(
                f"stage {self.spec.name}: no profile of {self._file.path} takes {given} "
                f"(min, opt, max of each: {known}); build engines with wider ones: hstu-trt engines --profile"
            )
        if fitting[0] != self._profile:
            if not self._context.set_optimization_profile_async(fitting[0], self._stream):
                raise HstuTrtError(f"{self._file.path}: profile {fitting[0]} was refused: {self._reason()}")
            self._driver.synchronize(self._stream)
            self._profile = fitting[0]

    def _make_allocator(self) -> Any:
        """TensorRT's call-back for outputs, whose shapes may be known only when it runs."""
        buffers = self._buffers

        class Allocator(self._trt.module.IOutputAllocator):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()
                self.shapes: dict[str, Shape] = {}
                self.failure: DeviceMemoryError | None = None

            def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
                try:
                    return buffers.device(tensor_name, size)
                except DeviceMemoryError as error:  # TensorRT takes no exceptions; a null pointer makes it give up
                    self.failure = error
                    return 0

            def reallocate_output_async(
                self, tensor_name: str, memory: int, size: int, alignment: int, stream: int
            ) -> int:
                return self.reallocate_output(tensor_name, memory, size, alignment)

            def notify_shape(self, tensor_name: str, shape: Any) -> None:
                self.shapes[tensor_name] = tuple(shape)

        return Allocator()

    def _check_ports(self) -> None:
        """Compares the engine's inputs and outputs with the contract: names, directions, dtypes, dims."""
        module, engine = self._trt.module, self._engine
        found = {}
        for number in range(engine.num_io_tensors):
            name = engine.get_tensor_name(number)
            mode = "input" if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT else "output"
            dtype = np.dtype(module.nptype(engine.get_tensor_dtype(name))).name
            found[name] = (mode, dtype, tuple(engine.get_tensor_shape(name)))
        wanted = {
            spec.name: (mode, spec.dtype, tuple(dim if isinstance(dim, int) else -1 for dim in spec.dims))
            for mode, specs in (("input", self.spec.inputs), ("output", self.spec.outputs))
            for spec in specs
        }
        for name in sorted({*found, *wanted}):
            if not _fits(found.get(name), wanted.get(name)):
                raise ArtefactError(
                    f"{self._file.path}: {name!r} is {found.get(name)}, the contract says {wanted.get(name)}; "
                    f"build it again with: {self._file.command}"
                )

    def _reason(self) -> str:
        return self._log.errors[-1].strip().splitlines()[0] if self._log.errors else "TensorRT gave no reason"


def _fits(found: tuple[str, str, Shape] | None, wanted: tuple[str, str, Shape] | None) -> bool:
    """Whether a tensor is the contract's; a profile may fix a dim that the contract leaves open."""
    if found is None or wanted is None or found[:2] != wanted[:2] or len(found[2]) != len(wanted[2]):
        return False
    return all(
        want in (-1, have) or (have == -1 and found[0] == "output")
        for have, want in zip(found[2], wanted[2], strict=True)
    )


def open_engine_runner(kind: str, model: ModelFolder, stage: str, engines: Path | None) -> TensorRtRunner:
    """The runner of a stage, from a folder of engines or from where `make engines` puts them for the GPU at hand.

    kind: the library to run with. Raises ConfigError without library or GPU, ArtefactError for wrong engines.
    """
    trt, driver = open_module(FLAVOURS[kind]), CudaDriver()
    folder = engines or default_folder(model, kind, driver.device().name)
    return TensorRtRunner(folder, stage, model, driver=driver, trt=trt)


def default_folder(model: ModelFolder, builder: str, device_name: str) -> Path:
    """Where ``make engines`` puts engines: build/engines/GPU/MODEL/PRECISION. Raises ConfigError for an unknown GPU."""
    target = target_of_device(device_name)
    if target is not None and builder in target.builders:
        return Path("build/engines") / target.name / model.name / model.precision
    raise ConfigError(f"{builder}: no preset is the GPU here ({device_name}); name a folder of engines with --engines")
