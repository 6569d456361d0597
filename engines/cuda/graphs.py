"""The fused model as CUDA graphs: one per bucket.

A batch of a bucket that has no graph yet runs operator by operator: that costs the host a few milliseconds of
launches, and a capture many more. So a capture never stands before an answer: whoever feeds the GPU makes it when it
has the time (``Graphs.capture_next``).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.engines.cuda.fused_batch import FusedModel
from hstu_trt.engines.cuda.packing import Bucket
from hstu_trt.engines.cuda.staging import StagingLayout

MOST_GRAPHS = 512
"""Captured graphs that are kept; the one unused for longest goes first. A graph holds no tensors of its own."""


@dataclass(frozen=True, kw_only=True)
class GraphMemory:
    """What the graphs read and write."""

    inputs: Tensor
    """uint8 on the device, as large as the largest bucket's layout, which stands at its beginning."""
    scores: Tensor
    """fp32 [candidates, tasks] on the device; a bucket's stand first."""
    host_inputs: Tensor
    """As ``inputs``, in pinned memory: where graphs that copy begin."""
    host_scores: Tensor
    """As ``scores``, in pinned memory: where graphs that copy end."""


class Key(NamedTuple):
    """Which graph."""

    bucket: Bucket
    copies: bool
    """From and to the host memory too: one launch does all, for a batch that has nothing to wait beside."""


class Forward:
    """The work on a batch of one bucket: from where it is staged to its scores. Enqueued on the current stream."""

    def __init__(self, model: FusedModel, layout: StagingLayout, memory: GraphMemory, key: Key) -> None:
        self._model, self._bytes, self._memory, self._key = model, layout.bytes, memory, key
        self._inputs = layout.inputs(memory.inputs)

    def __call__(self) -> None:
        """Operator by operator; or recorded, where the stream is being captured."""
        memory, out = self._memory, self._memory.scores[: self._key.bucket.candidates]
        if self._key.copies:
            memory.inputs[: self._bytes].copy_(memory.host_inputs[: self._bytes], non_blocking=True)
        self._model(self._inputs, out)
        if self._key.copies:
            memory.host_scores[: len(out)].copy_(out, non_blocking=True)

    def captured(self, pool: Any) -> torch.cuda.CUDAGraph:
        """Records the forward on the current stream, which may hold work that is not done. Nothing is executed.

        It must have run once: cuBLAS and the kernels load their code, and cuBLAS takes its workspace, outside of a
        capture. ``torch.cuda.graph`` would wait for the GPU, collect garbage and give the allocator's memory back.
        """
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what went wrong first counts
                graph.capture_end()
            raise
        graph.capture_end()
        return graph


class Graphs:
    """Graphs by bucket, for one stream of work: they share the memory of their intermediate tensors."""

    def __init__(self, config: HstuConfig, model: FusedModel, memory: GraphMemory) -> None:
        self._config, self._model, self._memory = config, model, memory
        self._graphs: OrderedDict[Key, torch.cuda.CUDAGraph] = OrderedDict()
        self._lacking: dict[Key, Forward] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._staged: Key | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def lacking(self) -> int:
        """Graphs that were asked for and are not there."""
        return len(self._lacking)

    def stage(self, key: Key) -> None:
        """Says whose batch stands where the forward of ``key`` reads first."""
        self._staged = key

    def run(self, key: Key) -> None:
        """Enqueues the forward of the batch that was staged: its graph, or its operators where there is none yet.

        Raises ConfigError if another bucket's batch is staged: offsets of another layout would lead a kernel anywhere.
        """
        if key != self._staged:
            raise ConfigError(
                f"forward of {key}: what is staged is a batch of {self._staged}; stage one of this bucket"
            )
        if key in self._graphs:
            self._graphs.move_to_end(key)
            self._graphs[key].replay()
            return
        if key not in self._lacking:
            self._lacking[key] = Forward(self._model, StagingLayout(self._config, key.bucket), self._memory, key)
        with torch.inference_mode():
            self._lacking[key]()

    def capture_next(self) -> None:
        """Captures the graph that has been lacking for longest, if any, on the current stream.

        Raises RuntimeError where there is no memory for it; its bucket is asked for anew when it is next met.
        """
        if not self._lacking:
            return
        key = next(iter(self._lacking))
        forward = self._lacking.pop(key)
        with torch.inference_mode():
            self._graphs[key] = forward.captured(self._pool)
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
