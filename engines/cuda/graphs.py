"""The fused model as CUDA graphs: one per bucket, captured when a bucket is first met."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from hstu_trt.contract.model import HstuConfig
from hstu_trt.engines.cuda.fused_batch import FusedModel
from hstu_trt.engines.cuda.packing import Bucket
from hstu_trt.engines.cuda.staging import StagingLayout

MOST_GRAPHS = 512
"""Captured graphs that are kept; the one unused for longest goes first. A graph holds no tensors of its own."""


class Captured:
    """A forward of one bucket. Its inputs stand at the beginning of ``inputs``, its scores of ``scores``."""

    def __init__(self, model: FusedModel, layout: StagingLayout, inputs: Tensor, scores: Tensor, pool: Any) -> None:
        bound = layout.inputs(inputs)
        out = scores[: layout.bucket.candidates]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # cuBLAS and the kernels load their code outside of the capture.
        with torch.cuda.stream(side):
            model(bound, out)
        side.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=side):
            model(bound, out)

    def replay(self) -> None:
        """Enqueues the forward on the current stream."""
        self._graph.replay()


class Graphs:
    """Graphs by bucket, for one stream of work: they share the memory of their intermediate tensors.

    inputs: uint8 on the device, as large as the largest bucket's layout. scores: fp32 [candidates, tasks].
    """

    def __init__(self, config: HstuConfig, model: FusedModel, inputs: Tensor, scores: Tensor) -> None:
        self._config, self._model = config, model
        self._inputs, self._scores = inputs, scores
        self._graphs: OrderedDict[Bucket, Captured] = OrderedDict()
        self._pool = torch.cuda.graph_pool_handle()

    def __len__(self) -> int:
        return len(self._graphs)

    def of(self, bucket: Bucket) -> Captured:
        """The graph of a bucket. Captures it if it is not there, with whatever stands in ``inputs``."""
        if bucket not in self._graphs:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode())
                torch.cuda.current_stream().synchronize()
                self._graphs[bucket] = Captured(
                    self._model, StagingLayout(self._config, bucket), self._inputs, self._scores, self._pool
                )
            if len(self._graphs) > MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(bucket)
        return self._graphs[bucket]
