"""What the tests on TensorRT share: op nodes of a graph, one call of an engine captured in a CUDA graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from hstu_trt.bench.workloads.requests_source import Requests

DOMAIN = "hstu.trt"


def lean_library(version: str, load: Callable[[str], Any]) -> str | None:
    """libnvinfer_lean of that very version, the system's or the wheel's; None where neither is there.

    version: as in ``11.4.0.106``. load: ``ctypes.CDLL``.
    """
    major, minor, patch = map(int, version.split(".")[:3])
    name = f"libnvinfer_lean.so.{major}"
    wheel = importlib.util.find_spec("tensorrt_lean_libs")
    folders = (wheel.submodule_search_locations or []) if wheel else []
    for path in (name, *(str(Path(folder) / name) for folder in folders)):
        with suppress(OSError):
            if load(path).getInferLibVersion() == major * 10_000 + minor * 100 + patch:
                return path
    return None


def rows_with(requests: Requests, histories: str) -> list[int]:
    """Rows of the users with ``some events`` or ``no event``; some of either."""
    rows = [row for row, length in enumerate(requests.history_lengths) if bool(length) == (histories == "some events")]
    assert rows, f"no request with {histories}"
    return rows


def op_nodes(onnx_file: Path) -> int:
    """Nodes of our ops in the main graph of a file: each must become a plugin layer."""
    import onnx

    graph = onnx.load(onnx_file, load_external_data=False).graph
    return sum(node.domain == DOMAIN for node in graph.node)


def other_lengths(feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
    """The same tokens dealt to the users in the opposite order: other offsets, ids and rows, equal shapes."""
    changed = dict(feed)
    for group in ("uih", "candidate"):
        lengths = np.diff(feed[f"{group}_offsets"])[::-1]
        changed[f"{group}_offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = len(feed[f"{group}_timestamps"])
        for name in (f"{group}_ids", f"{group}_embeddings"):
            if name in feed and tokens:
                rows = feed[name].reshape(tokens, -1)[::-1]
                changed[name] = np.ascontiguousarray(rows).reshape(feed[name].shape)
    return changed


class CapturedCall:
    """A call of an execution context on fixed addresses and shapes, captured in a CUDA graph.

    ``replay`` puts other values of the same shapes into the inputs, and returns the outputs.
    """

    def __init__(self, context: Any, feed: Mapping[str, NDArray], outputs: Mapping[str, str]) -> None:
        """outputs: name -> numpy dtype."""
        import torch

        self._inputs = {name: torch.from_numpy(np.ascontiguousarray(array)).cuda() for name, array in feed.items()}
        for name, tensor in self._inputs.items():
            assert context.set_input_shape(name, tuple(tensor.shape)), name
            assert context.set_tensor_address(name, tensor.data_ptr()), name
        shapes = {name: tuple(context.get_tensor_shape(name)) for name in outputs}
        assert all(size >= 0 for shape in shapes.values() for size in shape), (
            f"shapes not known before the run: {shapes}"
        )
        self._outputs = {
            name: torch.empty(shape, dtype=getattr(torch, outputs[name]), device="cuda")
            for name, shape in shapes.items()
        }
        for name, tensor in self._outputs.items():
            assert context.set_tensor_address(name, tensor.data_ptr()), name
        stream = torch.cuda.Stream()
        # TensorRT allocates and tunes in the first call with new shapes, which a capture must not see.
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            assert context.execute_async_v3(stream.cuda_stream)

    def replay(self, feed: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """The outputs for another feed of the same shapes."""
        import torch

        for name, array in feed.items():
            self._inputs[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        for tensor in self._outputs.values():
            tensor.fill_(float("nan"))
        torch.cuda.synchronize()
        self._graph.replay()
        torch.cuda.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in self._outputs.items()}
