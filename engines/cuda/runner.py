"""The runner ``cuda``: any stage of a ranking model on a GPU, and many requests at a time through the fused one.

Without a GPU it runs on plain PyTorch, which is how its logic is tested; that needs export's torch ops registered.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.errors import ConfigError, DeviceMemoryError
from hstu_trt.contract.features import Tensors, check_request
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import TAPS, ModelFolder
from hstu_trt.contract.split_users import one_user_feeds, user_count
from hstu_trt.contract.tensors import FUSED, Limits, Precision, float_dtype
from hstu_trt.engines.cuda.device_tables import DeviceTables, load_tables
from hstu_trt.engines.cuda.fused_batch import FusedModel
from hstu_trt.engines.cuda.memory import naming_lack_of_memory
from hstu_trt.engines.cuda.network import Network
from hstu_trt.engines.cuda.packing import FINE_STEPS, Bucket, Size, bucket_of, pack, rounded_rows
from hstu_trt.engines.cuda.pipeline import Pipeline, Slot
from hstu_trt.engines.cuda.staging import StagingLayout, UserFeed, Writer, size_of
from hstu_trt.engines.cuda.steps import HeadStep, HstuStep, LookupStep, Step
from hstu_trt.engines.cuda.weights import Dense, ModelWeights
from hstu_trt.engines.stages import engine_spec

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class CudaOptions:
    """Settings of the runner."""

    device: str = "cuda"
    """As PyTorch names it; ``cpu`` for tests."""
    max_tokens: int = 36_864
    """Tokens of a micro-batch; a single user may have more, up to the model's limits."""
    max_users: int = 63
    """Users of a micro-batch."""
    whole_items: bool = True
    """The attention never cuts long rows over multiprocessors (plugins/README.md): slower for small single requests."""
    bucket_steps: int = FINE_STEPS
    """Bucket sizes per doubling of a micro-batch's rows: fewer mean fewer graphs to capture, and more filler."""


class CudaModel:
    """A ranking model on a device: weights, and tables where a stage needs them.

    dense: the tensors of weights.safetensors. tables: [rows, E] by name, on the device.
    """

    def __init__(
        self,
        config: HstuConfig,
        dense: Mapping[str, Tensor],
        precision: Precision,
        tables: Mapping[str, Tensor] | None,
        options: CudaOptions,
    ) -> None:
        self.config, self.options = config, options
        self.device = torch.device(options.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device {options.device!r}: PyTorch sees no CUDA GPU here")
        dtype = _DTYPES[float_dtype(precision)]
        with torch.inference_mode():
            self.weights = ModelWeights.of(config, Dense(tensors=dense, dtype=dtype, device=self.device))
            self.network = Network(config, self.weights, whole_items=options.whole_items)
            self.tables = None if tables is None else DeviceTables(config, tables, dtype)
            self.fused = None if self.tables is None else FusedModel(self.network, self.tables)

    @classmethod
    def of_folder(cls, model: ModelFolder, options: CudaOptions, *, with_tables: bool) -> CudaModel:
        """The model of a folder. Raises DeviceMemoryError where the GPU lacks the memory for it."""
        from safetensors.torch import load_file

        dense = {key: value for key, value in load_file(model.weights).items() if key.startswith("_")}
        with naming_lack_of_memory():
            tables = load_tables(model, torch.device(options.device)) if with_tables else None
            return cls(model.ranking_config, dense, model.precision, tables, options)


class CudaRunner:
    """Executes one stage; a ``contract.runner.Runner``. Not for several threads at a time."""

    def __init__(self, model: ModelFolder, stage: str, options: CudaOptions | None = None) -> None:
        options = options or CudaOptions()
        self.spec = engine_spec(model, stage)
        self._limits = model.limits
        needs_tables = stage in (FUSED, "embedding_lookup")
        self._model = CudaModel.of_folder(model, options, with_tables=needs_tables)
        self._stage = _stage(self._model, stage, model.limits)

    def __enter__(self) -> CudaRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to release: memory goes with the runner."""

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        """Runs the stage on numpy arrays: inputs by name -> outputs by name.

        Raises InputError for a wrong feed, DeviceMemoryError where the GPU lacks the memory for it.
        """
        check_request(feed, self.spec, self._limits)
        with naming_lack_of_memory():
            return self._stage.run(feed)

    def infer_many(self, feeds: Sequence[Mapping[str, NDArray]]) -> list[Tensors]:
        """Several requests of the fused stage, packed into micro-batches. Raises InputError for a wrong feed."""
        for feed in feeds:
            check_request(feed, self.spec, self._limits)
        if not isinstance(self._stage, FusedRunner):
            return [self.infer(feed) for feed in feeds]
        with naming_lack_of_memory():
            return self._stage.run_many(feeds)


def _stage(model: CudaModel, stage: str, limits: Limits) -> FusedRunner | Step:
    return FusedRunner(model, limits) if stage == FUSED else step_of(model, stage)


def step_of(model: CudaModel, stage: str) -> Step:
    """One of the three stages, or ``hstu`` with every layer's output."""
    if stage == "embedding_lookup":
        assert model.tables is not None
        return LookupStep(model.config, model.tables, model.device)
    if stage == "mlp_head":
        return HeadStep(model.network, model.device)
    return HstuStep(model.network, model.device, taps=stage == TAPS)


class Submitted(NamedTuple):
    """A micro-batch on its way."""

    sizes: Sequence[Size]
    slot: Slot | None
    scores: Sequence[NDArray]
    """By user; of one that was not pipelined, which is done."""


class FusedRunner:
    """Ids -> scores, in micro-batches."""

    def __init__(self, model: CudaModel, limits: Limits) -> None:
        assert model.fused is not None
        self._model, self._config, self._options = model, model.config, model.options
        slots = len(model.config.contextual_slots)
        most = max(model.options.max_tokens, slots + limits.history + limits.candidates)
        # Prefix and candidates may each take up nearly the whole batch.
        users = 1 << model.options.max_users.bit_length()
        rows = rounded_rows(most, model.options.bucket_steps)
        self.largest = Bucket(rows, rows, users)
        self._pipeline = None
        # Plain operators, as an fp32 model has them on a GPU too, cannot be captured.
        if model.device.type == "cuda" and model.network.runs_on_kernels:
            self._pipeline = Pipeline(model.config, model.fused, self.largest, model.device)

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables' rows on the device."""
        assert self._model.tables is not None
        return self._model.tables.memory_bytes

    @property
    def pipeline(self) -> Pipeline | None:
        """What computes with graphs; None where the model runs operator by operator."""
        return self._pipeline

    def run(self, feed: Mapping[str, NDArray]) -> Tensors:
        """One request."""
        return self.run_many([feed])[0]

    def run_many(self, feeds: Sequence[Mapping[str, NDArray]]) -> list[Tensors]:
        """Several checked requests, users packed into micro-batches in their order."""
        users = [user for feed in feeds for user in ([feed] if user_count(feed) == 1 else one_user_feeds(feed))]
        scores = self._score(users)
        answers, first = [], 0
        for feed in feeds:
            count = user_count(feed)
            parts = scores[first : first + count]
            answers.append({"preds": parts[0] if count == 1 else np.concatenate(parts)})
            first += count
        return answers

    def _score(self, users: Sequence[UserFeed]) -> list[NDArray]:
        """Scores [candidates, tasks] of each user."""
        sizes = [self.size_of(user) for user in users]
        scores: list[NDArray] = []
        waiting: deque[Submitted] = deque()
        runs = list(pack(sizes, max_tokens=self._options.max_tokens, max_users=self._options.max_users))
        for run in runs:
            if len(waiting) == self.depth:
                scores += self.collect(waiting.popleft())
            waiting.append(self.submit(users[run.start : run.stop], alone=len(runs) == 1))
            with contextlib.suppress(DeviceMemoryError):  # then such batches go on without a graph
                self.capture_next()
        while waiting:
            scores += self.collect(waiting.popleft())
        return scores

    def size_of(self, user: UserFeed) -> Size:
        """Tokens of a user."""
        return size_of(self._config, user)

    @property
    def depth(self) -> int:
        """Micro-batches that may be on their way at a time."""
        return 1 if self._pipeline is None else self._pipeline.depth

    def submit(self, users: Sequence[UserFeed], *, alone: bool = False) -> Submitted:
        """Starts a micro-batch of checked users, with at most ``depth`` submitted and not yet collected.

        alone: nothing is on its way and nothing will follow at once; the scores are there on return. Threads may submit
        and collect beside each other, one each; batches are collected in the order in which they were submitted.
        Raises DeviceMemoryError where the GPU lacks the memory; there is nothing to collect then.
        """
        sizes = [self.size_of(user) for user in users]
        with naming_lack_of_memory():
            if self._pipeline is None or alone:
                return Submitted(sizes, None, self._alone(users, sizes))
            return Submitted(sizes, self._pipeline.submit(users, self._bucket(sizes)), ())

    def collect(self, batch: Submitted) -> list[NDArray]:
        """Waits for a micro-batch: scores [candidates, tasks] of each user. Raises DeviceMemoryError."""
        if batch.slot is None:
            return list(batch.scores)
        assert self._pipeline is not None
        with naming_lack_of_memory():
            return _by_user(self._pipeline.collect(batch.slot, sum(s.candidates for s in batch.sizes)), batch.sizes)

    def capture_next(self) -> None:
        """Makes the graph of one kind of batch that ran without, if there is any; not while another thread submits.

        It takes milliseconds. Raises DeviceMemoryError; such batches then go on without a graph.
        """
        if self._pipeline is not None:
            with naming_lack_of_memory():
                self._pipeline.capture_next()

    def _bucket(self, sizes: Sequence[Size]) -> Bucket:
        return bucket_of(sizes, self._options.bucket_steps)

    def _alone(self, users: Sequence[UserFeed], sizes: Sequence[Size]) -> list[NDArray]:
        """A batch with no other beside it."""
        if self._pipeline is not None:
            candidates = sum(size.candidates for size in sizes)
            return _by_user(self._pipeline.compute(users, self._bucket(sizes), candidates), sizes)
        layout = StagingLayout(self._config, self._bucket(sizes))
        buffer = torch.zeros(layout.bytes, dtype=torch.uint8)
        Writer(self._config).write(layout.arrays(buffer), layout.bucket, users)
        assert self._model.fused is not None
        with torch.inference_mode():
            return _by_user(self._model.fused(layout.inputs(buffer.to(self._model.device))).cpu().numpy(), sizes)


def _by_user(scores: NDArray, sizes: Sequence[Size]) -> list[NDArray]:
    ends = np.cumsum([size.candidates for size in sizes])
    return [scores[end - size.candidates : end] for end, size in zip(ends, sizes, strict=True)]
