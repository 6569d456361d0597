"""Which forwards may run, when graphs are captured, and when a slot's memory is written anew, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from golden_cases import load_case

from hstu_trt.contract.errors import ConfigError
from hstu_trt.engines.cuda.graphs import Forward, Graphs, Key
from hstu_trt.engines.cuda.packing import Bucket
from hstu_trt.engines.cuda.pipeline import Pipeline
from hstu_trt.engines.cuda.staging import StagingLayout

KEY, OTHER = Key(Bucket(128, 128, 2), copies=False), Key(Bucket(256, 128, 2), copies=False)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What forwards and graphs of stand-ins do, in order."""
    order: list[str] = []

    class Stand:
        def __init__(self, model: Any, layout: StagingLayout, memory: Any, key: Key) -> None:
            self.name = str(key.bucket.prefix)

        def __call__(self) -> None:
            order.append(f"operators {self.name}")

        def captured(self, pool: Any) -> Any:
            order.append(f"capture {self.name}")
            return SimpleNamespace(replay=lambda: order.append(f"graph {self.name}"))

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("hstu_trt.engines.cuda.graphs.Forward", Stand)
    return order


def graphs_of_case_a() -> Graphs:
    return Graphs(load_case("caseA").config, None, None)  # type: ignore[arg-type]


def run(graphs: Graphs, key: Key) -> None:
    graphs.stage(key)
    graphs.run(key)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("staged", [None, OTHER, Key(KEY.bucket, copies=True)], ids=str)
def test_nothing_runs_on_the_bytes_of_another(staged: Key | None, captured: bool, done: list[str]) -> None:
    graphs = graphs_of_case_a()
    if captured:
        run(graphs, KEY)
        graphs.capture_next()
    done.clear()
    graphs._staged = staged
    with pytest.raises(ConfigError, match="is staged"):
        graphs.run(KEY)
    assert not done
    run(graphs, KEY)
    assert done == ["graph 128" if captured else "operators 128"]


def test_a_new_bucket_runs_first_and_is_captured_later(done: list[str]) -> None:
    """The one that has been lacking for longest is captured first, each once."""
    graphs = graphs_of_case_a()
    for key in (KEY, OTHER, KEY):
        run(graphs, key)
    assert (len(graphs), graphs.lacking) == (0, 2)
    for _ in range(3):
        graphs.capture_next()
    run(graphs, OTHER)
    assert done == ["operators 128", "operators 256", "operators 128", "capture 128", "capture 256", "graph 256"]
    assert (len(graphs), graphs.lacking) == (2, 0)


def test_the_graph_unused_for_longest_makes_room(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hstu_trt.engines.cuda.graphs.MOST_GRAPHS", 2)
    graphs, third = graphs_of_case_a(), Key(Bucket(384, 128, 2), copies=False)
    for key in (KEY, OTHER, KEY, third):
        run(graphs, key)
        graphs.capture_next()
    done.clear()
    for key in (KEY, OTHER):
        run(graphs, key)
    assert done == ["graph 128", "operators 256"]


def test_a_capture_that_fails_is_asked_for_anew(done: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of_case_a()
    run(graphs, KEY)

    def fail(pool: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(graphs._lacking[KEY], "captured", fail)
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture_next()
    assert (len(graphs), graphs.lacking) == (0, 0)
    run(graphs, KEY)
    graphs.capture_next()
    assert done == ["operators 128", "operators 128", "capture 128"]


def test_a_capture_without_memory_is_ended_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ending it says of the part that was recorded is not the cause."""
    said: list[str] = []

    class Graph:
        def capture_begin(self, **_: object) -> None:
            said.append("begun")

        def capture_end(self) -> None:
            said.append("ended")
            raise RuntimeError("operation failed due to a previous error during capture")

    class Lacking(Forward):
        def __init__(self) -> None:
            pass

        def __call__(self) -> None:
            raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        Lacking().captured(None)
    assert said == ["begun", "ended"]


def test_a_batch_that_raised_is_waited_for_before_its_slot_is_written() -> None:
    """The part of it that was enqueued reads the slot, offsets and all."""
    done: list[str] = []
    slot: Any = SimpleNamespace(done=SimpleNamespace(record=lambda: done.append("recorded")))
    with pytest.raises(torch.OutOfMemoryError), Pipeline.__new__(Pipeline)._recorded(slot):
        raise torch.OutOfMemoryError("full")
    assert done == ["recorded"]


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
