"""The three stages of the model one by one, on tensors that stay on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model import HstuConfig
from hstu_trt.engines.cuda.device_tables import DeviceTables
from hstu_trt.engines.cuda.network import Network, item_rows
from hstu_trt.engines.cuda.stage_batch import batch_of_rows


class Step(Protocol):
    """A stage over checked feeds."""

    def run(self, feed: Mapping[str, NDArray]) -> Tensors: ...

    def run_tensors(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]: ...


class _Step:
    """What the stages share: numpy in and out around tensors."""

    def run(self, feed: Mapping[str, NDArray]) -> Tensors:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feed.items()}
        return {name: tensor.cpu().numpy() for name, tensor in self.run_tensors(tensors).items()}

    def run_tensors(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name, on the host or the device -> outputs on the device, enqueued on the current stream."""
        with torch.inference_mode():
            return self._run(feed)

    def _run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


class LookupStep(_Step):
    """Ids -> rows."""

    def __init__(self, config: HstuConfig, tables: DeviceTables, device: torch.device) -> None:
        self._tables, self._device = tables, device
        self._features = {"uih": config.uih_features, "candidate": config.candidate_features}
        if config.contextual_slots:
            self._features["contextual"] = config.contextual_slots

    def _run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        answers = {}
        for group, features in self._features.items():
            ids = feed[f"{group}_ids"].to(self._device).t().contiguous()
            rows = [self._tables.look_up(name, ids[n]) for n, name in enumerate(features)]
            answers[f"{group}_embeddings"] = rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
        return answers


class HstuStep(_Step):
    """Rows -> user vectors; with ``taps`` every layer's output too. Offsets are read on the host."""

    def __init__(self, network: Network, device: torch.device, *, taps: bool) -> None:
        self._network, self._device, self._taps = network, device, taps

    def _run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        network = self._network
        batch = batch_of_rows(network.config, network.weights, feed, self._device)
        taps: list[Tensor] | None = [] if self._taps else None
        rows = network.vectors_before_norm(batch, taps)
        vectors = network.user_vectors(rows, batch.timestamps[batch.prefix_tokens :])
        return {"user_embeddings": vectors, **{f"stu.{n}.out": tap for n, tap in enumerate(taps or ())}}


class HeadStep(_Step):
    """User vectors and candidate rows -> scores."""

    def __init__(self, network: Network, device: torch.device) -> None:
        self._network, self._device = network, device

    def _run(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        config = self._network.config
        width = len(config.item_embedding_features) * config.embedding_dim
        rows = feed["candidate_embeddings"].to(self._device)[:, :width].contiguous()
        items = item_rows(self._network.weights, rows)
        return {"preds": self._network.scores_of_vectors(feed["user_embeddings"].to(self._device), items)}
