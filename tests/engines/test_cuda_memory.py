"""Too little memory on a GPU, with stand-ins for the GPU: what is said, and what is given back."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from table_versions import DIM, rows_of

from hstu_trt.contract.errors import DeviceMemoryError, InputError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.table_format import write_table, write_tables_manifest
from hstu_trt.engines.cuda import device_tables, memory
from hstu_trt.engines.cuda.memory import naming_lack_of_memory, require_free
from hstu_trt.plugins.library import KernelError

GIB = 1 << 30
LACKING = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.\nMore of it"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    KernelError("attention: cudaErrorMemoryAllocation"),
]


@pytest.mark.parametrize("error", LACKING, ids=lambda error: str(error)[:40])
def test_whoever_lacks_memory_it_has_one_name(error: Exception) -> None:
    with pytest.raises(DeviceMemoryError) as caught, naming_lack_of_memory():
        raise error
    assert str(caught.value) == str(error).partition("\n")[0]


@pytest.mark.parametrize("error", [InputError("offsets"), RuntimeError("CUDA error: an illegal memory access")])
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), naming_lack_of_memory():
        raise error


def test_what_failed_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors lie in the frames of the error, and memory that is in use cannot be given back."""
    alive: list[bool] = []
    held: list[weakref.ref] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[0]() is not None))

    def lack() -> None:
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("full")

    with pytest.raises(DeviceMemoryError), naming_lack_of_memory():
        lack()
    assert alive == [False]


@pytest.mark.parametrize(("needed", "fits"), [(3 * GIB, True), (3 * GIB + 1, False)])
def test_what_is_needed_and_what_is_free_is_said(monkeypatch: pytest.MonkeyPatch, needed: int, fits: bool) -> None:
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda device: (3 * GIB, 80 * GIB))
    if fits:
        require_free(needed, torch.device("cuda"))
        return
    words = r"the tables take 3.00 GiB of GPU memory, and 3.00 of the 80.00 GiB of cuda are free: .*nvidia-smi"
    with pytest.raises(DeviceMemoryError, match=words):
        require_free(needed, torch.device("cuda"))
    require_free(needed, torch.device("cpu"))


def test_no_memory_for_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(device: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lack)
    with pytest.raises(DeviceMemoryError, match=r"not even memory free for a CUDA context .* take 3.00 GiB"):
        require_free(3 * GIB, torch.device("cuda"))


def test_tables_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As their shards hold them, end to end; asked for by all their bytes."""
    asked: list[int] = []
    monkeypatch.setattr(device_tables, "require_free", lambda needed, _: asked.append(needed))
    rows = {"one": rows_of(1, 300, "float16"), "many": rows_of(2, 300, "float16")}
    stored = [
        write_table(
            tmp_path / "tables", TableConfig(name=name, rows=300, dim=DIM, dtype="float16", features=(name,)), [block],
            300 * DIM * 2 if name == "one" else 128 * DIM * 2,
        )
        for name, block in rows.items()
    ]  # fmt: skip
    assert [len(table.shards) for table in stored] == [1, 3]
    write_tables_manifest(tmp_path / "tables", stored, "a test", {})
    found = device_tables.load_tables(SimpleNamespace(tables=tmp_path / "tables"), torch.device("cpu"))  # type: ignore[arg-type]
    assert found.keys() == rows.keys()
    assert all(np.array_equal(found[name].numpy(), block) for name, block in rows.items())
    assert asked == [2 * 300 * DIM * 2]
