"""The plugin library, as the builders and runners of TensorRT use it."""

from __future__ import annotations

from pathlib import Path

from hstu_trt.contract.ops import OPS
from hstu_trt.engines.modules import TensorRt


def plugin_library() -> Path:
    """The library file. Raises ArtefactError naming `make plugins` where it is missing."""
    from hstu_trt.plugins import trt_library  # type: ignore[attr-defined]

    return Path(trt_library.plugin_library())


def register_plugins(trt: TensorRt) -> None:
    """Loads the library into the process's plugin registry; a second call finds the creators there."""
    from hstu_trt.plugins import trt_library  # type: ignore[attr-defined]

    registry = trt.module.get_plugin_registry()
    if any(registry.get_creator(op.name, op.version, op.domain) is None for op in OPS.values()):
        trt_library.load_plugins(registry)
