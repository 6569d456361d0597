"""The TensorRT plugins in NVIDIA's own runtimes, 10.15 and 11.4, without a GPU: both ways of loading, creating from
fields, and everything that a builder asks, from a C++ host."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_tables import HASHES, STORED, write_folder, write_versions

from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.ops import EMBEDDING_LOOKUP, HSTU_ATTENTION, OP_DOMAIN, OPS
from hstu_trt.contract.plugin_files import AUTOLOAD_LIBRARY
from hstu_trt.contract.stored_table import HashKind
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.plugins.build import BUILD_FOLDER

SESSION = Path(__file__).parents[1] / "support/lean_session.py"
HOST = "hstu_trt_plugin_host"


def session(lean: Path, how: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, str(SESSION), str(lean), how]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def check_ops(ops: dict[str, Any]) -> None:
    for name, spec in OPS.items():
        seen = ops[name]
        assert seen["fields"] == [attribute.name for attribute in spec.attributes]
        build, runtime = seen["TensorRTPhase.BUILD"], seen["TensorRTPhase.RUNTIME"]
        assert build == runtime
        assert build[:3] == ["IPluginV3OneBuildV2", name, OP_DOMAIN]
        assert all(attribute.name in build[3] for attribute in spec.attributes)
        assert all(seen[bad] for bad in ("unknown", "wrong value", "wrong type"))
        assert seen["defaults"]


def test_the_registry_loads_creates_and_unloads(plugins: Path, lean: Path) -> None:
    facts, said = session(lean, "load")
    assert facts["version"] == lean.name.removeprefix("lean-")
    assert facts["before"] == facts["unloaded"] == []
    assert facts["loaded"] == facts["again"] == sorted(OPS)
    check_ops(facts["ops"])
    for name in OPS:
        assert f"{name}: layer: field 'nonsense' is no attribute" in said
        assert f"{name}: layer: output_type must be 1" in said
        assert f"{name}: layer: field 'output_type' must be INT32" in said


def headers_major(plugins: Path) -> int:
    """The major version that the autoload library was built for."""
    cache = (BUILD_FOLDER / "CMakeCache.txt").read_text()
    folder = re.search(r"^TensorRT_INCLUDE_DIR:\w+=(.*)$", cache, re.MULTILINE)
    assert folder
    version = re.search(r"#define TRT_MAJOR_ENTERPRISE (\d+)", (Path(folder[1]) / "NvInferVersion.h").read_text())
    assert version
    return int(version[1])


def test_a_plain_dlopen_registers_in_its_major_version(plugins: Path, lean: Path) -> None:
    facts, said = session(lean, "dlopen")
    major = headers_major(plugins)
    if facts["version"].startswith(f"{major}."):
        assert facts["loaded"] == sorted(OPS)
        check_ops(facts["ops"])
    else:
        assert facts["loaded"] == []
        assert f"for TensorRT {major}: not registered: this process has none" in said


def test_the_autoload_library_without_tensorrt_says_so_and_does_nothing(plugins: Path) -> None:
    code = f"import ctypes; ctypes.CDLL({str(plugins.with_name(AUTOLOAD_LIBRARY))!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "not registered: this process has none of that major version, or not yet" in result.stderr


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    config = TableConfig(name="item_id", rows=10, dim=8, dtype="float16", features=("item_id",))
    blocks = [np.arange(80, dtype=np.float16).reshape(10, 8)]
    write_tables_manifest(folder, [write_table(folder, config, blocks, shard_bytes=64)], "a test", {})
    return folder


def host(plugins: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(plugins.with_name(HOST)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def check_contract(result: subprocess.CompletedProcess[str], creators: str) -> None:
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert failed == [] and result.returncode == 0, result.stdout + result.stderr
    assert creators in result.stdout
    passed = re.search(r"(\d+) checks passed, 0 failed", result.stdout)
    assert passed and int(passed[1]) > 110


def test_what_a_builder_asks(plugins: Path, tables: Path) -> None:
    result = host(plugins, "contract", "--tables", str(tables))
    check_contract(result, "creators from getCreators")
    assert result.stderr == ""  # there is a logger: sentences go to it


@pytest.mark.parametrize("hashing", HASHES)
@pytest.mark.parametrize("dtype", STORED)
def test_tables_of_all_kinds_are_found_by_name(plugins: Path, tmp_path: Path, dtype: str, hashing: HashKind) -> None:
    rows = np.arange(80, dtype=np.float32).reshape(10, 8)
    result = host(plugins, "contract", "--tables", str(write_folder(tmp_path, {"item_id": (rows, dtype)}, hashing)))
    check_contract(result, "creators from getCreators")


def test_a_folder_of_versions_leads_to_the_one_in_use(plugins: Path, tmp_path: Path) -> None:
    folder = write_versions(tmp_path)
    assert host(plugins, "contract", "--tables", str(folder)).returncode == 0
    for name, content in (("wide", "wide"), ("../v1", "../v1"), ("empty", "")):
        (folder / "CURRENT").write_text(f"{content}\n")
        assert host(plugins, "contract", "--tables", str(folder)).returncode == 1, name


def test_what_a_builder_asks_of_creators_from_the_registry(plugins: Path, lean: Path, tables: Path) -> None:
    (runtime,) = (lean / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*")
    version = ".".join(lean.name.removeprefix("lean-").split(".")[:2])
    result = host(plugins, "contract", "--runtime", str(runtime), "--tables", str(tables))
    check_contract(result, f"creators from registry of TensorRT {version}")
    assert "EmbeddingLookup: createPlugin" not in result.stderr
    assert "HstuAttention: configurePlugin: q and k must have the same dim" in result.stderr


# (what to replace in the manifest, by what, what is said)
DAMAGES = [
    ('"dim": 8', '"dim": 9', "is not what the manifest says"),
    ('"rows": 10', '"rows": 11', "do not add up"),
    ('"rows": 10', '"rows": -1', "an integer of at least 0"),
    ("float16", "bfloat16", "must be float32, float16, int8 or float8_e4m3fn"),
    ("float16", "int8", "quantiser is unknown"),
    ('"dim": 8', '"dim": 8, "compression": 1', "an option that is unknown here: 'compression'"),
    ('"dim": 8', '"dim": 8, "hash": {"kind": "md5"}', "ids are hashed by 'md5'"),
    ('"dim": 8', '"dim": 8, "hash": {"kind": "splitmix64", "seed": -1}', "an integer of 64 bits"),
    ('"dim": 8', '"dim": 8, "hash": {"kind": "permutation", "file": "manifest.json"}', "no file of a permutation"),
    ('"dim": 8', '"dim": 8, "default_row": 10', "the default row is none of the table's"),
    ('[\n     "item_id/', '[\n     "../item_id/', "outside its folder"),
    ('"kind": "tables"', '"kind": "onnx"', "not one of tables"),
    ('"schema": 1,', '"schema": 1', "JSON: '}' was expected"),
]


@pytest.mark.parametrize("lean", ["10.15.1.29"], indirect=True)
@pytest.mark.parametrize(("old", "new", "said"), DAMAGES)
def test_a_damaged_folder_of_tables_is_refused_in_words(
    plugins: Path, lean: Path, tables: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    folder = tmp_path / "tables"
    shutil.copytree(tables, folder)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    assert old in text
    manifest.write_text(text.replace(old, new))
    (runtime,) = (lean / "tensorrt_lean_libs").glob("libnvinfer_lean.so.*")
    result = host(plugins, "contract", "--runtime", str(runtime), "--tables", str(folder))
    assert result.returncode == 1
    assert f"table 'item_id' in HSTU_TRT_TABLES={folder}: " in result.stderr
    assert said in result.stderr


def run_tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_libraries_show_nothing_but_what_they_must(plugins: Path) -> None:
    exported = {"libhstu_trt_plugins.so": ["getCreators", "setLoggerFinder"], AUTOLOAD_LIBRARY: []}
    for name, names in exported.items():
        path = str(plugins.with_name(name))
        symbols = [line.split()[-1] for line in run_tool("nm", "-D", "--defined-only", path).splitlines()]
        assert sorted(symbols) == names
        undefined = run_tool("nm", "-D", "--undefined-only", path)
        assert not re.search(r"nvinfer|getPluginRegistry|getInferLib|createInfer|getLogger|\bcuda|\bcu[A-Z]", undefined)
        needed = re.findall(r"NEEDED.*\[(.*)\]", run_tool("readelf", "-d", path))
        assert needed and not [library for library in needed if re.search("nvinfer|cuda", library)]
    assert "NODELETE" in run_tool("readelf", "-d", str(plugins.with_name(AUTOLOAD_LIBRARY)))


def test_no_path_and_no_table_is_part_of_a_plan() -> None:
    names = {attribute.name for spec in (HSTU_ATTENTION, EMBEDDING_LOOKUP) for attribute in spec.attributes}
    assert not [name for name in names if re.search("path|file|folder|url|secret|key", name)]
