"""The TensorRT plugin libraries (``contract/plugin_files.py`` has their places): into a plugin registry, and for which.

``libhstu_trt_plugins.so`` is for whoever calls a registry's ``load_library``: this module, ``trtexec
--dynamicPlugins``, ``setPluginsToSerialize``. ``libhstu_trt_plugins_autoload.so``, beside it, is for hosts that only
dlopen: Triton's ``plugins=``, ``polygraphy --plugins``, ``trtexec --staticPlugins``. TensorRT must be in the process
before it.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.ops import OP_DOMAIN, OP_VERSION, OPS
from hstu_trt.contract.plugin_files import plugin_library, plugin_path
from hstu_trt.plugins.build import HEADERS_KEY, RECORD

__all__ = ["TABLES_VARIABLE", "check_headers", "headers_version", "load_plugins", "major", "plugin_library"]

TABLES_VARIABLE = "HSTU_TRT_TABLES"
"""Environment variable with the folder in which EmbeddingLookup finds tables by their name, at run time."""


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


def headers_version() -> str:
    """Version of TensorRT's headers that the plugin library was built with, as in ``10.14.1``; empty: unknown."""
    record = plugin_path().with_name(RECORD.name)
    return str(json.loads(record.read_text()).get(HEADERS_KEY, "")) if record.is_file() else ""


def major(version: str) -> int:
    """``10.14.1`` -> 10."""
    return int(version.partition(".")[0])


def check_headers() -> None:
    """Raises ArtefactError unless the plugin library was built for the major version of Python's ``tensorrt``.

    The autoload library does nothing in another: TensorRT's own tools would then run the ops' function bodies.
    """
    try:
        there = str(importlib.import_module("tensorrt").__version__)
    except ImportError as error:
        raise ArtefactError(
            f"Python's tensorrt cannot be imported ({error}): install it, or leave out what asks for it (--tensorrt)"
        ) from None
    built = headers_version()
    if not built:
        raise ArtefactError(f"nothing says which headers {plugin_library()} was built with: run `make plugins` again")
    if major(built) != major(there):
        raise ArtefactError(
            f"{plugin_library()} was built with the headers of TensorRT {built}, and TensorRT {there} is installed: "
            f"have TENSORRT_ROOT name an unpacked TensorRT {major(there)}, or install libnvinfer-headers-dev of that "
            "version, and run `make plugins` again"
        )


def _missing(registry: Any) -> list[str]:
    return [name for name in OPS if registry.get_creator(name, OP_VERSION, OP_DOMAIN) is None]
