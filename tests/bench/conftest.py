"""Stand-ins for the runners: arithmetic that keeps users apart, so that the chain around it can be checked."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from hstu_trt.contract.model_folder import TAPS, ModelFolder
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import FUSED, Limits, StageSpec

LIMITS = Limits(users=8, history=256, candidates=64, batch_history=2048, batch_candidates=512)


class FakeRunner:
    """A stage as numpy arithmetic. ``error`` is added to every score."""

    def __init__(self, model: ModelFolder, stage: str, error: float = 0.0) -> None:
        self.spec: StageSpec = model.specs["hstu" if stage == TAPS else stage]
        self.stage = stage
        self.model = model
        self.error = error
        self.entered = 0

    def __enter__(self) -> "FakeRunner":
        self.entered += 1
        return self

    def __exit__(self, *_: object) -> None:
        self.entered -= 1

    def infer(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.entered, "used outside of its context"
        assert set(feed) == {tensor.name for tensor in self.spec.inputs}
        compute = {"embedding_lookup": self._lookup, "mlp_head": self._head, FUSED: self._fused}
        return compute.get(self.stage, self._hstu)(feed)

    def _lookup(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        dim = self.model.ranking_config.embedding_dim
        return {
            name.replace("_ids", "_embeddings"): np.repeat(ids % 97 / 97, dim, axis=1).astype(np.float32)
            for name, ids in feed.items()
        }

    def _hstu(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        config = self.model.ranking_config
        history = [feed["uih_embeddings"][a:b].sum() for a, b in _spans(feed["uih_offsets"])]
        counts = np.diff(feed["candidate_offsets"])
        own = feed["candidate_embeddings"][:, :1]
        mixed = np.repeat(history, counts)[:, None] / feed["attention_norm"][0] + own
        answers = {"user_embeddings": np.repeat(mixed, config.model_dim, axis=1).astype(np.float32)}
        if self.stage == TAPS:
            answers |= {f"stu.{layer}.out": self._tap(feed, own) for layer in range(config.layers)}
        return answers

    def _tap(self, feed: Mapping[str, np.ndarray], own: np.ndarray) -> np.ndarray:
        prefixes = []
        for user, (a, b) in enumerate(_spans(feed["uih_offsets"])):
            prefixes += [feed["contextual_embeddings"][user : user + 1, :1], feed["uih_embeddings"][a:b, :1]]
        return np.concatenate([*prefixes, own]).astype(np.float32)

    def _head(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        logits = feed["user_embeddings"][:, :1] - feed["candidate_embeddings"][:, -1:] + self.error
        return {"preds": (1 / (1 + np.exp(-logits))).astype(np.float32)}

    def _fused(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shaped = {
            name: feed[name].reshape(-1, 2) if name in ("uih_ids", "candidate_ids") else feed[name]
            for name in ("uih_ids", "candidate_ids", "contextual_ids")
        }
        rows = self._lookup(shaped)
        vectors = self._hstu({**feed, **rows})
        return self._head({**rows, **vectors})


def _spans(offsets: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


@pytest.fixture
def fake_model() -> ModelFolder:
    """A model folder that is on no disk; ``FakeRunner`` and generated workloads need no file of it."""
    return ModelFolder(path=Path("fake"), name="fake", config=debug(), limits=LIMITS, precision="fp32", digest="0" * 64)


@pytest.fixture
def fake_runner() -> type[FakeRunner]:
    """The class of the stand-ins: ``fake_runner(model, stage, error=0.0)``."""
    return FakeRunner
