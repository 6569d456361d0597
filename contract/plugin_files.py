"""Where the TensorRT plugin libraries lie: for the room that loads them, and for those that hand their path on."""

from __future__ import annotations

import os
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError

LIBRARY_FOLDER = Path(__file__).resolve().parents[1] / "build/lib"
PLUGIN_LIBRARY = "libhstu_trt_plugins.so"
AUTOLOAD_LIBRARY = "libhstu_trt_plugins_autoload.so"
PLUGINS_VARIABLE = "HSTU_TRT_PLUGINS"
"""Environment variable with the path of another plugin library than the one in build/lib."""


def plugin_library() -> Path:
    """libhstu_trt_plugins.so. Raises ArtefactError where there is none."""
    return _there(plugin_path())


def autoload_library() -> Path:
    """libhstu_trt_plugins_autoload.so, beside the plugin library. Raises ArtefactError where there is none."""
    return _there(plugin_library().with_name(AUTOLOAD_LIBRARY))


def plugin_path() -> Path:
    """Where the plugin library is looked for."""
    named = os.environ.get(PLUGINS_VARIABLE)
    return Path(named) if named else LIBRARY_FOLDER / PLUGIN_LIBRARY


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ArtefactError(
            f"{path} is not there: build the plugins with `make plugins` (it needs TensorRT's headers, "
            f"and fetches some where there are none), or have {PLUGINS_VARIABLE} name a plugin library"
        )
    return path.resolve()
