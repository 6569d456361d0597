"""The plugin library, as the builders and runners of TensorRT use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hstu_trt.engines.modules import TensorRt


def plugin_library() -> Path:
    """The library file. Raises ArtefactError naming `make plugins` where it is missing."""
    from hstu_trt.plugins import trt_library

    return Path(trt_library.plugin_library())


def register_plugins(trt: TensorRt) -> None:
    """Loads the library into the process's plugin registry, once. Raises ArtefactError."""
    from hstu_trt.plugins import trt_library

    trt_library.load_plugins(trt.module.get_plugin_registry())


@contextmanager
def tables_at(folder: Path) -> Iterator[None]:
    """While it lasts, the lookup plugin finds its tables in ``folder``."""
    from hstu_trt.plugins import trt_library

    name = trt_library.TABLES_VARIABLE
    before = os.environ.get(name)
    os.environ[name] = str(folder.absolute())
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
