"""Which graphs may be replayed, and when a slot's memory is written anew, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_cases import load_case

from hstu_trt.contract.errors import ConfigError
from hstu_trt.engines.cuda.graphs import Graphs, Key
from hstu_trt.engines.cuda.packing import Bucket
from hstu_trt.engines.cuda.pipeline import Pipeline
from hstu_trt.engines.cuda.staging import StagingLayout

KEY = Key(Bucket(128, 128, 2), copies=False)


@pytest.mark.parametrize(
    "staged", [None, Key(Bucket(256, 128, 2), copies=False), Key(KEY.bucket, copies=True)], ids=str
)
def test_a_graph_is_not_replayed_on_the_bytes_of_another(staged: Key | None, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    graph: Any = SimpleNamespace(replay=lambda: replayed.append(KEY))
    graphs = Graphs(load_case("caseA").config, None, None)  # type: ignore[arg-type]
    graphs._graphs[KEY] = graph
    if staged is not None:
        graphs.stage(staged)
    with pytest.raises(ConfigError, match="what is staged"):
        graphs.replay(KEY)
    assert not replayed
    graphs.stage(KEY)
    graphs.replay(KEY)
    assert replayed == [KEY]


def test_a_slot_is_written_when_its_last_batch_is_done() -> None:
    """A run that raised leaves batches which nobody collects."""
    order: list[str] = []
    slot: Any = SimpleNamespace(
        done=SimpleNamespace(synchronize=lambda: order.append("waited")), arrays=lambda layout: layout
    )
    pipeline = Pipeline.__new__(Pipeline)
    pipeline._layouts = {KEY.bucket: StagingLayout(load_case("caseA").config, KEY.bucket)}
    pipeline._writer = SimpleNamespace(write=lambda *_: order.append("written"))  # type: ignore[assignment]
    pipeline._lay_out(slot, [], KEY.bucket)
    assert order == ["waited", "written"]
