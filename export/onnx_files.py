"""The .onnx files of a model folder: graphs whose weights lie in one safetensors file and whose tables in theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import torch
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model import TableConfig
from hstu_trt.contract.model_folder import TABLES_FOLDER, WEIGHTS_FILE
from hstu_trt.contract.shards import read_safetensors_header
from hstu_trt.contract.table_format import PAYLOAD_ALIGNMENT
from hstu_trt.export.onnx_export import TABLE_PREFIX
from hstu_trt.export.tables import Progress, table_file_bytes

# Tensors smaller than this stay in the .onnx file: constants that shape inference reads.
INLINE_BYTES = 1024


def write_graphs(
    folder: Path,
    dense: Mapping[str, Tensor],
    models: Mapping[str, onnx.ModelProto],
    tables: Iterable[TableConfig],
    progress: Progress,
) -> None:
    """Writes one safetensors file of weights, lets every graph refer to it and to the tables, and saves the graphs.

    folder: the model folder, with its tables. dense: by the names that initialisers bear. models: by stage.
    Raises ArtefactError where a graph does not pass ONNX's check, OSError where a file cannot be written.
    """
    weights = {key: value.contiguous() for key, value in dense.items()}
    table_configs = {table.name: table for table in tables}
    # What tracing itself made (folded constants) has names that mean nothing outside its graph.
    made = {
        f"{stage}.{initializer.name}": torch.from_numpy(onnx.numpy_helper.to_array(initializer).copy())
        for stage, model in models.items()
        for initializer in model.graph.initializer
        if initializer.name not in weights and _is_external(initializer) and not _table_of(initializer)
    }
    offsets = _write_weights(folder / WEIGHTS_FILE, weights | made)
    for stage, model in models.items():
        for initializer in model.graph.initializer:
            table = _table_of(initializer)
            if table is not None:
                _point_at_table(initializer, table_configs[table])
            elif _is_external(initializer):
                name = initializer.name if initializer.name in weights else f"{stage}.{initializer.name}"
                _point_outside(initializer, WEIGHTS_FILE, *offsets[name])
        progress(f"checking {stage}.onnx")
        _save_checked(model, folder / f"{stage}.onnx")


def _table_of(initializer: onnx.TensorProto) -> str | None:
    """The table's name if an initializer is an embedding table."""
    return initializer.name.removeprefix(TABLE_PREFIX) if initializer.name.startswith(TABLE_PREFIX) else None


def _is_external(initializer: onnx.TensorProto) -> bool:
    """Whether an initializer's data belongs into the weights file."""
    return len(initializer.raw_data) >= INLINE_BYTES


def _point_outside(initializer: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Replaces an initializer's data by a reference into a file beside the .onnx."""
    initializer.ClearField("raw_data")
    initializer.data_location = onnx.TensorProto.EXTERNAL
    del initializer.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        initializer.external_data.add(key=key, value=value)


def _save_checked(model: onnx.ModelProto, path: Path) -> None:
    """Writes the file and runs ONNX's full check on it, with its external data in place."""
    onnx.save(model, path)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ArtefactError(f"{path.name}: the exported model does not pass ONNX's full check: {error}") from None


def _point_at_table(initializer: onnx.TensorProto, table: TableConfig) -> None:
    """Of its one shard (``tables.py``)."""
    initializer.dims[:] = [table.rows, table.dim]
    file = f"{TABLES_FOLDER}/{table.name}/00000.safetensors"
    _point_outside(initializer, file, PAYLOAD_ALIGNMENT, table_file_bytes(table))


def _write_weights(path: Path, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Writes tensors and returns where each lies: name -> (offset in the file, bytes)."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(weights), path)
    except SafetensorError as error:  # which is no OSError, a full disk or not
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(0o644)  # safetensors makes files that only their owner reads; a server is another user
    header, begin = read_safetensors_header(path)
    return {
        name: (begin + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
