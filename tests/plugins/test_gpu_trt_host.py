"""The C++ host on a GPU: enqueue of both plugins as TensorRT calls it, and what the shells cost beside the bare launch.

HSTU_TRT_LEAN may name a libnvinfer or libnvinfer_lean (``.so.N``, or that packed as ``.so.N.xz``), several by colons:
then creators come from its registry as well. HSTU_TRT_ROWS names a file that the measured rows are added to.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from gpu_tables import write_cases, write_versions

from hstu_trt.bench.result_rows import Provenance, ResultRow, append_rows, cuda_versions
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.plugins.library import ROOT

pytestmark = pytest.mark.gpu

TABLE_ROWS = 1_000_000
NO_RUNTIME = "no lean runtime"


def runtimes() -> list[str]:
    """The empty string for none, then those that HSTU_TRT_LEAN names, else those of `make test-plugins`.

    Where there are none of either, a name that stands for them: the test is skipped, and so seen.
    """
    named = [path for path in os.environ.get("HSTU_TRT_LEAN", "").split(":") if path]
    found = [str(path) for path in sorted(ROOT.glob("build/tensorrt/lean-*/*/libnvinfer_lean.so.*"))]
    return ["", *(named or found or [NO_RUNTIME])]


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of row * 8 + column: large enough for its memory to be seen."""
    folder = tmp_path_factory.mktemp("tables")
    config = TableConfig(name="item_id", rows=TABLE_ROWS, dim=8, dtype="float32", features=("item_id",))
    blocks = np.array_split(np.arange(TABLE_ROWS * 8, dtype=np.float32).reshape(-1, 8), 3)
    write_tables_manifest(folder, [write_table(folder, config, blocks, shard_bytes=10 << 20)], "a test", {})
    return folder


def unpacked(runtime: str, folder: Path) -> Path:
    if not runtime.endswith(".xz"):
        return Path(runtime)
    path = folder / Path(runtime).stem
    with lzma.open(runtime) as packed, path.open("wb") as stream:
        shutil.copyfileobj(packed, stream)
    return path


def rows(printed: str) -> list[ResultRow]:
    import torch

    provenance = vars(Provenance.here(torch.cuda.get_device_name(), cuda_versions(), os.environ.get("HSTU_TRT_COMMIT")))
    found = [json.loads(line[4:]) for line in printed.splitlines() if line.startswith("ROW ")]
    return [
        ResultRow(
            **provenance, suite="plugins", case=f"HstuAttention {row['case']}", variant="enqueue, host time",
            median_us=row["median_us"], spread=row["spread"],
            ratio_to={"bare launch": row["bare_us"] / row["median_us"]},
            checks={"overhead_us": row["median_us"] - row["bare_us"], "bare_spread": row["bare_spread"]},
        )
        for row in found
    ]  # fmt: skip


@pytest.mark.parametrize("runtime", runtimes(), ids=lambda path: Path(path).name or "getCreators")
def test_the_host_drives_the_plugins(plugins: Path, tables: Path, tmp_path: Path, runtime: str) -> None:
    if runtime == NO_RUNTIME:
        pytest.skip("no lean runtime: `make test-plugins` brings two, or HSTU_TRT_LEAN names one")
    assert write_cases(tmp_path / "cases") == 120
    versions = write_versions(tmp_path / "versions")
    command = [str(plugins.with_name("hstu_trt_plugin_host")), "run", "--tables", str(tables)]
    command += ["--cases", str(tmp_path / "cases"), "--versions", str(versions)]
    if runtime:
        command += ["--runtime", str(unpacked(runtime, tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    print(result.stdout + result.stderr)
    assert result.returncode == 0, [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    measured = rows(result.stdout)
    assert len(measured) == 3
    if not runtime and (path := os.environ.get("HSTU_TRT_ROWS")):
        append_rows(Path(path), measured)
