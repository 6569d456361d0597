"""Finding the plugin library and loading it into a registry: what is said when it is not there, or is another."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hstu_trt.contract import plugin_files
from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.ops import OPS
from hstu_trt.contract.plugin_files import PLUGINS_VARIABLE, autoload_library, plugin_library
from hstu_trt.plugins.build import RECORD
from hstu_trt.plugins.trt_library import check_headers, headers_version, load_plugins


class Registry:
    """A registry in which loading a library brings some of the plugins."""

    def __init__(self, brings: tuple[str, ...]) -> None:
        self.brings, self.loaded, self.names = brings, [], set()

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        return object() if name in self.names and (version, namespace) == ("1", "hstu.trt") else None

    def load_library(self, path: str) -> None:
        self.loaded.append(path)
        self.names |= set(self.brings)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of libraries, empty."""
    monkeypatch.delenv(PLUGINS_VARIABLE, raising=False)
    monkeypatch.setattr(plugin_files, "LIBRARY_FOLDER", tmp_path)
    return tmp_path


def test_a_missing_library_names_what_builds_it(folder: Path) -> None:
    for find in (plugin_library, autoload_library, lambda: load_plugins(Registry(()))):
        with pytest.raises(ArtefactError, match=r"libhstu_trt_plugins\.so is not there.*make plugins"):
            find()
    (folder / "libhstu_trt_plugins.so").touch()
    with pytest.raises(ArtefactError, match=r"libhstu_trt_plugins_autoload\.so is not there"):
        autoload_library()


def test_a_variable_names_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = folder / "other/plugins.so"
    monkeypatch.setenv(PLUGINS_VARIABLE, str(other))
    with pytest.raises(ArtefactError, match=r"other/plugins\.so is not there"):
        plugin_library()
    other.parent.mkdir()
    other.touch()
    assert plugin_library() == other


def test_plugins_are_loaded_once(folder: Path) -> None:
    (folder / "libhstu_trt_plugins.so").touch()
    registry = Registry(tuple(OPS))
    load_plugins(registry)
    load_plugins(registry)
    assert registry.loaded == [str(folder / "libhstu_trt_plugins.so")]


@pytest.mark.parametrize("brings", [(), ("HstuAttention",)])
def test_a_library_without_the_plugins_is_refused(folder: Path, brings: tuple[str, ...]) -> None:
    (folder / "libhstu_trt_plugins.so").touch()
    with pytest.raises(ArtefactError, match=r"has no .*EmbeddingLookup after loading"):
        load_plugins(Registry(brings))


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"tensorrt_headers": "11.1.0"}, None),
        ({"tensorrt_headers": "10.14.1"}, r"headers of TensorRT 10\.14\.1, and TensorRT 11\.4\.0\.106 .*TENSORRT_ROOT"),
        ({"tensorrt_headers": ""}, "nothing says which headers"),
        ({}, "nothing says which headers"),
        (None, "nothing says which headers"),
    ],
)
def test_plugins_are_for_one_major_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch, record: dict[str, str] | None, said: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.106"))
    assert headers_version() == ""
    (folder / "libhstu_trt_plugins.so").touch()
    if record is not None:
        (folder / RECORD.name).write_text(json.dumps(record))
    if said is None:
        check_headers()
        return
    with pytest.raises(ArtefactError, match=said):
        check_headers()
