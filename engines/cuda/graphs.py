"""The fused model as CUDA graphs: one per bucket, captured when a bucket is first met."""

from __future__ import annotations

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


class Captured:
    """A forward of one bucket."""

    def __init__(self, model: FusedModel, layout: StagingLayout, memory: GraphMemory, key: Key, pool: Any) -> None:
        bound = layout.inputs(memory.inputs)
        out = memory.scores[: key.bucket.candidates]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # cuBLAS and the kernels load their code outside of the capture.
        with torch.cuda.stream(side):
            model(bound, out)
        side.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=side):
            if key.copies:
                memory.inputs[: layout.bytes].copy_(memory.host_inputs[: layout.bytes], non_blocking=True)
            model(bound, out)
            if key.copies:
                memory.host_scores[: key.bucket.candidates].copy_(out, non_blocking=True)

    def replay(self) -> None:
        """Enqueues the forward on the current stream."""
        self._graph.replay()


class Graphs:
    """Graphs by bucket, for one stream of work: they share the memory of their intermediate tensors."""

    def __init__(self, config: HstuConfig, model: FusedModel, memory: GraphMemory) -> None:
        self._config, self._model, self._memory = config, model, memory
        self._graphs: OrderedDict[Key, Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()
        self._staged: Key | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Key) -> bool:
        return key in self._graphs

    def stage(self, key: Key) -> None:
        """Says whose batch stands where the graph ``key`` reads first; a new one in ``memory.inputs`` as well."""
        self._staged = key

    def replay(self, key: Key) -> None:
        """Enqueues the forward of the batch that was staged; captures the graph first if it is not there.

        Raises ConfigError if another graph's batch is staged: offsets of another layout would lead a kernel anywhere.
        """
        if key != self._staged:
            raise ConfigError(f"graph of {key}: what is staged is a batch of {self._staged}; stage one of this bucket")
        self._of(key).replay()

    def _of(self, key: Key) -> Captured:
        if key not in self._graphs:
            with torch.inference_mode():
                torch.cuda.current_stream().synchronize()
                layout = StagingLayout(self._config, key.bucket)
                self._graphs[key] = Captured(self._model, layout, self._memory, key, self._pool)
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key]
