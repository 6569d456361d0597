"""What a deployment must answer to any tensors, computed in this process without Triton."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.models.stages import RunnerStage, UserBatches
from hstu_trt.serving.served import models_of
from hstu_trt.serving.signature import DENSE_ID, signatures
from hstu_trt.tables.ids import POLICIES, Policy
from hstu_trt.tables.lookup_stage import HostLookup

_MOST_KEPT = 4096


class Oracle:
    """The answer of each served model, or the InputError that it must give. For deployments of flavour ``cpu``."""

    def __init__(self, deployment: Deployment) -> None:
        if deployment.flavour != "cpu" or deployment.versions.exists():
            raise ConfigError(
                f"{deployment.path}: the answers of a deployment with published versions, or of flavour "
                f"{deployment.flavour!r}, cannot be told in advance; fuzz a fresh one of flavour 'cpu'"
            )
        self.model = deployment.model
        self.config = deployment.model.ranking_config
        signed = signatures(self.config, self.model.limits, self.model.precision)
        self.served = deployment.served
        self.signatures = {name: signed[name] for name in models_of(deployment.served)}
        self.atol = TOLERANCES[ENSEMBLE, self.model.tolerances].atol
        self._lookup = HostLookup(self.model, _policy(deployment.id_policy))
        norm = parse_fixed_norm(deployment.attention_norm)
        hstu, head = (OnnxRuntimeRunner(self.model, stage, threads=1, spin=False) for stage in ("hstu", "mlp_head"))
        self._stages = {"hstu": RunnerStage(hstu, norm), "mlp_head": RunnerStage(head, None)}
        self._users = UserBatches(self.model)
        self._kept: dict[bytes, Tensors | InputError] = {}

    def answer(self, model: str, tensors: Mapping[str, NDArray]) -> Tensors:
        """Outputs by name. Raises InputError."""
        digest = hashlib.blake2b(model.encode())
        for name, array in sorted(tensors.items()):
            data = repr(array.tolist()).encode() if array.dtype == object else array.tobytes()
            digest.update(f"{name} {array.shape}".encode() + data)
        key = digest.digest()
        if key not in self._kept:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            try:
                self._kept[key] = self._answer(model, dict(tensors))
            except InputError as error:
                self._kept[key] = error
        kept = self._kept[key]
        if isinstance(kept, InputError):
            raise kept
        return kept

    def steps(self, packed: Tensors) -> Tensors:
        """What goes between the steps for a request to ``ranking``."""
        rows = self._lookup.infer(_ids(packed))
        payload = {name: array for name, array in packed.items() if not name.endswith("_ids")}
        vectors = self._stages["hstu"].infer(rows | payload)
        return {**rows, **vectors, DENSE_ID: np.asarray([self.model.digest.encode()], dtype=object)}

    def _answer(self, model: str, tensors: Tensors) -> Tensors:
        if model == "embedding_lookup":
            return self._lookup.infer(tensors)
        if model == ENSEMBLE:
            return self._score(tensors)
        if model == FUSED:
            users = len(tensors["candidate_timestamps"])
            preds = self._score(self._users.pack(tensors))["preds"]
            return {"preds": preds.reshape(users, -1, preds.shape[1])}
        (name,) = tensors.pop(DENSE_ID).tolist()
        if name.decode(errors="replace") != self.model.digest:
            raise InputError(f"tensor {DENSE_ID!r} names no dense model")
        return self._stages[model].infer(tensors)

    def _score(self, packed: Tensors) -> Tensors:
        steps = self.steps(packed)
        names = ("user_embeddings", "candidate_embeddings")
        return self._stages["mlp_head"].infer({name: steps[name] for name in names})


def _ids(packed: Tensors) -> Tensors:
    return {name: array for name, array in packed.items() if name.endswith("_ids")}


def _policy(text: str) -> Policy:
    for known in POLICIES:
        if text == known:
            return known
    raise ConfigError(f"unknown id policy {text!r}")
