"""The TensorRT plugin libraries: where they are, and loading them into a plugin registry.

``libhstu_trt_plugins.so`` is for whoever calls a registry's ``load_library``: this module, ``trtexec
--dynamicPlugins``, ``setPluginsToSerialize``. ``libhstu_trt_plugins_autoload.so``, beside it, is for hosts that only
dlopen: Triton's ``plugins=``, ``polygraphy --plugins``, ``trtexec --staticPlugins``. TensorRT must be in the process
before it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.ops import OP_DOMAIN, OP_VERSION, OPS
from hstu_trt.plugins.library import LIBRARY_FOLDER

PLUGIN_LIBRARY = "libhstu_trt_plugins.so"
AUTOLOAD_LIBRARY = "libhstu_trt_plugins_autoload.so"
PLUGINS_VARIABLE = "HSTU_TRT_PLUGINS"
"""Environment variable with the path of another plugin library than the one in build/lib."""
TABLES_VARIABLE = "HSTU_TRT_TABLES"
"""Environment variable with the folder in which EmbeddingLookup finds tables by their name, at run time."""


def plugin_library() -> Path:
    """libhstu_trt_plugins.so. Raises ArtefactError where there is none."""
    named = os.environ.get(PLUGINS_VARIABLE)
    return _there(Path(named) if named else LIBRARY_FOLDER / PLUGIN_LIBRARY)


def autoload_library() -> Path:
    """libhstu_trt_plugins_autoload.so, beside the plugin library. Raises ArtefactError where there is none."""
    return _there(plugin_library().with_name(AUTOLOAD_LIBRARY))


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ArtefactError(
            f"{path} is not there: build the plugins with `make plugins` (it needs TensorRT's headers, "
            "and fetches some where there are none)"
        )
    return path.resolve()


def load_plugins(registry: Any) -> None:
    """Loads the plugins into ``registry``, the plugin registry of a TensorRT module; does nothing if they are there.

    registry: what ``tensorrt.get_plugin_registry()`` returns, or that of the lean bindings or of TensorRT-RTX.
    Raises ArtefactError if the library is missing or the registry does not take it.
    """
    if not _missing(registry):
        return
    path = plugin_library()
    registry.load_library(str(path))
    if missing := _missing(registry):
        raise ArtefactError(
            f"TensorRT's plugin registry has no {', '.join(missing)} after loading {path}: it is no plugin library, or "
            "one built with the headers of a TensorRT that is too different; run `make plugins` where this TensorRT is"
        )


def _missing(registry: Any) -> list[str]:
    return [name for name in OPS if registry.get_creator(name, OP_VERSION, OP_DOMAIN) is None]
