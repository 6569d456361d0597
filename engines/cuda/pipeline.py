"""Batches through the GPU, copies beside the computation.

While a batch computes, the next is laid out in pinned memory and copied to the device on a stream of its own, and the
scores of the one before come back. A batch that comes alone has nothing to run beside: one graph copies, computes and
copies back. A slot is the memory of one batch on its way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from hstu_trt.contract.model import HstuConfig
from hstu_trt.engines.cuda.fused_batch import FusedModel
from hstu_trt.engines.cuda.graphs import GraphMemory, Graphs, Key
from hstu_trt.engines.cuda.packing import Bucket
from hstu_trt.engines.cuda.staging import StagingLayout, UserFeed, Writer


class Slot:
    """Memory of one batch between host and device."""

    def __init__(self, staging_bytes: int, scores_shape: tuple[int, int], device: torch.device) -> None:
        self.host = torch.zeros(staging_bytes, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(staging_bytes, dtype=torch.uint8, device=device)
        self.scores = torch.empty(scores_shape, dtype=torch.float32, pin_memory=True)
        self.copied, self.done = torch.cuda.Event(), torch.cuda.Event()
        self._arrays: dict[Bucket, dict[str, NDArray]] = {}

    def arrays(self, layout: StagingLayout) -> dict[str, NDArray]:
        """The host memory as the tensors of a bucket."""
        if layout.bucket not in self._arrays:
            self._arrays[layout.bucket] = layout.arrays(self.host)
        return self._arrays[layout.bucket]


class Pipeline:
    """Computes batches on a GPU in the order in which they come.

    largest: the largest bucket that will come. depth: batches on their way at a time.
    """

    def __init__(
        self, config: HstuConfig, model: FusedModel, largest: Bucket, device: torch.device, depth: int = 3
    ) -> None:
        self._config, self._device = config, device
        self._writer = Writer(config)
        self._layouts: dict[Bucket, StagingLayout] = {}
        staging = StagingLayout(config, largest).bytes
        shape = (largest.candidates, len(config.tasks))
        self._slots = [Slot(staging, shape, device) for _ in range(depth)]
        self._memory = GraphMemory(
            inputs=torch.zeros(staging, dtype=torch.uint8, device=device),
            scores=torch.zeros(shape, dtype=torch.float32, device=device),
            host_inputs=self._slots[0].host,
            host_scores=self._slots[0].scores,
        )
        self.graphs = Graphs(config, model, self._memory)
        self._next = 0
        self._compute, self._copies = torch.cuda.Stream(device), torch.cuda.Stream(device)
        # Buffers were cleared on another stream.
        torch.cuda.synchronize(device)

    @property
    def depth(self) -> int:
        return len(self._slots)

    def submit(self, feeds: Sequence[UserFeed], bucket: Bucket) -> Slot:
        """Enqueues a batch; the slot is free again when ``collect`` has been called for it."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        layout = self._lay_out(slot, feeds, bucket)
        used, inputs, scores = layout.bytes, self._memory.inputs, self._memory.scores
        with torch.cuda.device(self._device):
            with torch.cuda.stream(self._copies):
                slot.device[:used].copy_(slot.host[:used], non_blocking=True)
                slot.copied.record()
            with torch.cuda.stream(self._compute), self._recorded(slot):
                slot.copied.wait()
                inputs[:used].copy_(slot.device[:used])
                self.graphs.stage(Key(bucket, copies=False))
                self.graphs.run(Key(bucket, copies=False))
                slot.scores[: bucket.candidates].copy_(scores[: bucket.candidates], non_blocking=True)
        return slot

    def collect(self, slot: Slot, candidates: int) -> NDArray:
        """Waits for a batch: scores [candidates, tasks], copied out of the slot."""
        slot.done.synchronize()
        return np.array(slot.scores[:candidates].numpy())

    def compute(self, feeds: Sequence[UserFeed], bucket: Bucket, candidates: int) -> NDArray:
        """A batch with nothing beside it: its scores. All slots must have been collected."""
        slot = self._slots[0]
        self._lay_out(slot, feeds, bucket)
        with torch.cuda.device(self._device), torch.cuda.stream(self._compute), self._recorded(slot):
            self.graphs.stage(Key(bucket, copies=True))
            self.graphs.run(Key(bucket, copies=True))
        slot.done.synchronize()
        return np.array(slot.scores[:candidates].numpy())

    def capture_next(self) -> None:
        """Captures one graph that a batch had to do without, if any: milliseconds in which no batch is submitted."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._compute):
            self.graphs.capture_next()

    @contextmanager
    def _recorded(self, slot: Slot) -> Iterator[None]:
        """Records the end of what is enqueued, be it a part: where memory lacks, what came before reads the slot."""
        try:
            yield
        finally:
            slot.done.record()

    def _lay_out(self, slot: Slot, feeds: Sequence[UserFeed], bucket: Bucket) -> StagingLayout:
        """Writes a batch to a slot's host memory.

        Waits for what was enqueued with the slot before: a run that raised leaves batches that nobody collects, whose
        bytes must not change while they are copied.
        """
        layout = self._layout(bucket)
        slot.done.synchronize()
        self._writer.write(slot.arrays(layout), bucket, feeds)
        return layout

    def _layout(self, bucket: Bucket) -> StagingLayout:
        if bucket not in self._layouts:
            self._layouts[bucket] = StagingLayout(self._config, bucket)
        return self._layouts[bucket]
