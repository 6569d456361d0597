"""The runner ``cuda``: any stage of a ranking model on a GPU, and many requests at a time through the fused one.

Without a GPU it runs on plain PyTorch, which is how its logic is tested; that needs export's torch ops registered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.features import Tensors, check_request
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import TAPS, ModelFolder
from hstu_trt.contract.split_users import one_user_feeds, user_count
from hstu_trt.contract.tensors import FUSED, Limits, Precision, StageSpec, float_dtype
from hstu_trt.engines.cuda.device_tables import DeviceTables, load_tables
from hstu_trt.engines.cuda.fused_batch import FusedModel
from hstu_trt.engines.cuda.memory import naming_lack_of_memory
from hstu_trt.engines.cuda.network import Network, item_rows
from hstu_trt.engines.cuda.packing import Bucket, Size, bucket_of, pack, rounded_rows
from hstu_trt.engines.cuda.pipeline import Pipeline
from hstu_trt.engines.cuda.stage_batch import batch_of_rows
from hstu_trt.engines.cuda.staging import StagingLayout, UserFeed, Writer, size_of
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
        """The model of a folder."""
        from safetensors.torch import load_file

        dense = {key: value for key, value in load_file(model.weights).items() if key.startswith("_")}
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
        self._stage = _stage(self._model, stage, self.spec, model.limits)

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
        with torch.inference_mode(), naming_lack_of_memory():
            return self._stage.run(feed)

    def infer_many(self, feeds: Sequence[Mapping[str, NDArray]]) -> list[Tensors]:
        """Several requests of the fused stage, packed into micro-batches. Raises InputError for a wrong feed."""
        for feed in feeds:
            check_request(feed, self.spec, self._limits)
        if not isinstance(self._stage, FusedRunner):
            return [self.infer(feed) for feed in feeds]
        with naming_lack_of_memory():
            return self._stage.run_many(feeds)


def _stage(model: CudaModel, stage: str, spec: StageSpec, limits: Limits) -> Any:
    if stage == FUSED:
        return FusedRunner(model, limits)
    if stage == "embedding_lookup":
        return _LookupStage(model, spec)
    return _HeadStage(model) if stage == "mlp_head" else _HstuStage(model, taps=stage == TAPS)


class FusedRunner:
    """Ids -> scores, in micro-batches."""

    def __init__(self, model: CudaModel, limits: Limits) -> None:
        assert model.fused is not None
        self._model, self._config, self._options = model, model.config, model.options
        slots = len(model.config.contextual_slots)
        most = max(model.options.max_tokens, slots + limits.history + limits.candidates)
        # Prefix and candidates may each take up nearly the whole batch.
        users = 1 << model.options.max_users.bit_length()
        self.largest = Bucket(rounded_rows(most), rounded_rows(most), users)
        self._pipeline = None
        # Plain operators, as an fp32 model has them on a GPU too, cannot be captured.
        if model.device.type == "cuda" and model.network.runs_on_kernels:
            self._pipeline = Pipeline(model.config, model.fused, self.largest, model.device)

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
        sizes = [size_of(self._config, user) for user in users]
        scores: list[NDArray] = []
        waiting: deque[tuple[Any, list[Size]]] = deque()
        runs = list(pack(sizes, max_tokens=self._options.max_tokens, max_users=self._options.max_users))
        for run in runs:
            part, part_sizes = users[run.start : run.stop], sizes[run.start : run.stop]
            if self._pipeline is None or len(runs) == 1:
                scores += self._alone(part, part_sizes)
                continue
            if len(waiting) == self._pipeline.depth:
                scores += self._collected(*waiting.popleft())
            waiting.append((self._pipeline.submit(part, bucket_of(part_sizes)), part_sizes))
        while waiting:
            scores += self._collected(*waiting.popleft())
        return scores

    def _collected(self, slot: Any, sizes: Sequence[Size]) -> list[NDArray]:
        assert self._pipeline is not None
        return _by_user(self._pipeline.collect(slot, sum(size.candidates for size in sizes)), sizes)

    def _alone(self, users: Sequence[UserFeed], sizes: Sequence[Size]) -> list[NDArray]:
        """A batch with no other beside it."""
        if self._pipeline is not None:
            candidates = sum(size.candidates for size in sizes)
            return _by_user(self._pipeline.compute(users, bucket_of(sizes), candidates), sizes)
        layout = StagingLayout(self._config, bucket_of(sizes))
        buffer = torch.zeros(layout.bytes, dtype=torch.uint8)
        Writer(self._config).write(layout.arrays(buffer), layout.bucket, users)
        assert self._model.fused is not None
        with torch.inference_mode():
            return _by_user(self._model.fused(layout.inputs(buffer.to(self._model.device))).cpu().numpy(), sizes)


def _by_user(scores: NDArray, sizes: Sequence[Size]) -> list[NDArray]:
    ends = np.cumsum([size.candidates for size in sizes])
    return [scores[end - size.candidates : end] for end, size in zip(ends, sizes, strict=True)]


class _LookupStage:
    """Ids -> rows."""

    def __init__(self, model: CudaModel, spec: StageSpec) -> None:
        assert model.tables is not None
        self._tables, self._device = model.tables, model.device
        config = model.config
        self._features = {"uih": config.uih_features, "candidate": config.candidate_features}
        if config.contextual_slots:
            self._features["contextual"] = config.contextual_slots

    def run(self, feed: Mapping[str, NDArray]) -> Tensors:
        answers = {}
        for group, features in self._features.items():
            ids = torch.from_numpy(np.ascontiguousarray(feed[f"{group}_ids"].T)).to(self._device)
            rows = [self._tables.look_up(name, ids[n]) for n, name in enumerate(features)]
            answers[f"{group}_embeddings"] = torch.cat(rows, dim=1).cpu().numpy()
        return answers


class _HstuStage:
    """Rows -> user vectors; with ``taps`` every layer's output too."""

    def __init__(self, model: CudaModel, *, taps: bool) -> None:
        self._model, self._taps = model, taps

    def run(self, feed: Mapping[str, NDArray]) -> Tensors:
        network, device = self._model.network, self._model.device
        batch = batch_of_rows(self._model.config, self._model.weights, feed, device)
        taps: list[Tensor] | None = [] if self._taps else None
        rows = network.vectors_before_norm(batch, taps)
        vectors = network.user_vectors(rows, batch.timestamps[batch.prefix_tokens :])
        answers = {"user_embeddings": vectors, **{f"stu.{n}.out": tap for n, tap in enumerate(taps or ())}}
        return {name: tensor.cpu().numpy() for name, tensor in answers.items()}


class _HeadStage:
    """User vectors and candidate rows -> scores."""

    def __init__(self, model: CudaModel) -> None:
        self._model = model

    def run(self, feed: Mapping[str, NDArray]) -> Tensors:
        config, device = self._model.config, self._model.device
        width = len(config.item_embedding_features) * config.embedding_dim
        rows = torch.from_numpy(np.ascontiguousarray(feed["candidate_embeddings"][:, :width])).to(device)
        vectors = torch.from_numpy(np.ascontiguousarray(feed["user_embeddings"])).to(device)
        items = item_rows(self._model.weights, rows)
        return {"preds": self._model.network.scores_of_vectors(vectors, items).cpu().numpy()}
