"""libhstu_trt_kernels.so through ctypes: where it is, its functions, and the mirror of its parameters."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.plugin_files import LIBRARY_FOLDER

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = "libhstu_trt_kernels.so"
LIBRARY_VARIABLE = "HSTU_TRT_LIB"
"""Environment variable with the path of another library than the one in build/lib."""

ABI_VERSION = 3
KERNELS = {"auto": 0, "sm90": 1, "smxx": 2, "fp32": 3}
"""Kernels as ``AttentionKernel`` numbers them (kernels/attention/attention.h)."""
DATA_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "float8_e4m3fn": 3}
"""Types by their name in torch, as ``DataType`` numbers them."""
TABLE_TYPES = {**DATA_TYPES, "int8": 4}
"""Those of embedding tables."""


class KernelError(HstuTrtError):
    """A launch failed. Names CUDA's error."""

    exit_code = 1


class UnsupportedError(HstuTrtError):
    """No kernel, or not the chosen one, can do a call. Carries the library's sentence."""


class TokenTensor(Structure):
    """``TokenTensor`` of kernels/attention/params.h."""

    _fields_ = (("data", c_void_p), ("row_stride", c_int64), ("head_stride", c_int64))


def _fields() -> list[tuple[str, type]]:
    tensors = ["q", "k", "v", "out", "cached_k", "cached_v"]
    pointers = [
        "cached_offsets", "page_table", "query_offsets", "prefix_offsets", "candidate_offsets", "norm", "attn_scale",
        "q_scale", "k_scale", "v_scale", "position_bias", "time_bias", "query_timestamps", "key_timestamps",
        "workspace",
    ]  # fmt: skip
    counts = [
        "users", "heads", "qk_dim", "v_dim", "query_rows", "key_rows", "cached_rows", "page_size", "pages_per_user",
        "norm_count", "attn_scale_count", "scale_count", "position_bias_count", "time_bias_count", "type",
        "output_type",
    ]  # fmt: skip
    options = [
        "causal", "max_attn_len", "contextual_seq_len", "min_full_attn_seq_len", "candidate_group_size",
        "packed_values", "reuse_plan", "whole_items",
    ]  # fmt: skip
    return [
        *((name, TokenTensor) for name in tensors),
        *((name, c_void_p) for name in pointers),
        *((name, c_int32) for name in counts),
        ("alpha", c_float),
        *((name, c_int32) for name in options),
    ]


class AttentionParams(Structure):
    """``AttentionParams`` of kernels/attention/params.h, field by field."""

    _fields_ = _fields()


class EmbeddingTable(Structure):
    """``EmbeddingTable`` of kernels/embedding/params.h."""

    _fields_ = (
        ("hot", c_void_p), ("scales", c_void_p), ("direct_rows", c_int64), ("rows", c_int64), ("hot_rows", c_int64),
        ("cold_rows", c_int64), ("cold", c_void_p), ("row_of_id", c_void_p), ("overlay", c_void_p),
        ("overlay_scales", c_void_p), ("overlay_slots", c_void_p), ("overlay_mask", c_int64), ("id_count", c_int64),
        ("default_row", c_int64), ("seed", c_uint64), ("version", c_uint64), ("hash", c_int32), ("reserved", c_int32),
    )  # fmt: skip


class EmbeddingColumns(Structure):
    """``EmbeddingColumns`` of kernels/embedding/params.h."""

    _fields_ = (
        ("ids", c_void_p), ("id_stride", c_int64), ("status", c_void_p), ("bad_ids", c_void_p),
        ("live_table", c_int32), ("dim", c_int32), ("first", c_int32), ("type", c_int32), ("table", EmbeddingTable),
        ("status_stride", c_int64),
    )  # fmt: skip


MAX_COLUMNS = 8
"""Tables that one call looks up in, ``kMaxEmbeddingColumns``."""


class EmbeddingParams(Structure):
    """``EmbeddingParams`` of kernels/embedding/params.h, field by field."""

    _fields_ = (
        ("out", c_void_p), ("lengths", c_void_p), ("live_tables", c_void_p), ("latch", c_void_p), ("count", c_int64),
        ("out_stride", c_int64), ("padded_length", c_int64), ("padding_id", c_int64), ("policy", c_int32),
        ("has_padding", c_int32), ("output_type", c_int32), ("wide_ids", c_int32),
        ("wide_status", c_int32), ("column_count", c_int32), ("columns", EmbeddingColumns * MAX_COLUMNS),
    )  # fmt: skip


_STRUCTS = ("attention_params", "embedding_params", "embedding_columns", "embedding_table")


class Field(Structure):
    """``HstuTrtField`` of capi/capi.h."""

    _fields_ = (("name", c_char_p), ("offset", c_size_t), ("size", c_size_t))


Functions = dict[str, tuple[Any, list[Any]]]
"""C functions by name: their result's type and their arguments'."""
_PARAMS = POINTER(AttentionParams)
_EMBEDDING_PARAMS = POINTER(EmbeddingParams)
_FUNCTIONS: Functions = {
    "hstu_trt_abi_version": (c_int32, []),
    "hstu_trt_cuda_archs": (c_char_p, []),
    **{f"hstu_trt_{name}_size": (c_size_t, []) for name in _STRUCTS},
    **{f"hstu_trt_{name}_fields": (c_size_t, [POINTER(POINTER(Field))]) for name in _STRUCTS},
    "hstu_trt_attention_unsupported": (c_char_p, [_PARAMS, c_int32, c_int32]),
    "hstu_trt_attention_workspace_size": (c_size_t, [_PARAMS, c_int32]),
    "hstu_trt_launch_attention": (c_int32, [_PARAMS, c_int32, c_void_p]),
    "hstu_trt_launch_pack_values": (c_int32, [_PARAMS, c_void_p, c_void_p]),
    "hstu_trt_value_blocks": (c_int32, [c_int32, c_int32]),
    "hstu_trt_embedding_unsupported": (c_char_p, [_EMBEDDING_PARAMS]),
    "hstu_trt_launch_embedding_lookup": (c_int32, [_EMBEDDING_PARAMS, c_void_p]),
    "hstu_trt_launch_embedding_publish": (c_int32, [c_void_p, c_void_p, c_void_p]),
    "hstu_trt_error_name": (c_char_p, [c_int32]),
    "hstu_trt_error_text": (c_char_p, [c_int32]),
}


class KernelLibrary:
    """The loaded library. Raises ArtefactError if it is missing, or if its parameters are not the mirror's."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ArtefactError(f"{path} is not there: build the kernels with `make plugins`")
        self._functions = open_functions(path, _FUNCTIONS)
        self.path = path
        self.archs = tuple(self._functions.hstu_trt_cuda_archs().decode().split(","))
        if differences := self.layout_differences():
            raise ArtefactError(f"{path} is of other sources ({differences[0]}): run `make plugins`")

    def layout_differences(self) -> list[str]:
        """Sentences on where the library's structs are not the mirrors; none if they are the same."""
        version = self._functions.hstu_trt_abi_version()
        found = [f"version {version} of the C face, not {ABI_VERSION}"] if version != ABI_VERSION else []
        mirrors = (AttentionParams, EmbeddingParams, EmbeddingColumns, EmbeddingTable)
        for name, mirror in zip(_STRUCTS, mirrors, strict=True):
            size = getattr(self._functions, f"hstu_trt_{name}_size")()
            fields = POINTER(Field)()
            count = getattr(self._functions, f"hstu_trt_{name}_fields")(ctypes.byref(fields))
            found += struct_differences(fields[:count], size, mirror)
        return found

    def unsupported(self, params: AttentionParams, kernel: str, capability: int) -> str | None:
        """Why ``kernel`` cannot do a call on a GPU of a compute capability (90 for 9.0); None if it can."""
        sentence = self._functions.hstu_trt_attention_unsupported(params, KERNELS[kernel], capability)
        return sentence.decode() if sentence else None

    def workspace_size(self, params: AttentionParams, kernel: str) -> int:
        """Bytes of workspace that a launch needs."""
        return self._functions.hstu_trt_attention_workspace_size(params, KERNELS[kernel])

    def launch_attention(self, params: AttentionParams, kernel: str, stream: int) -> None:
        """Enqueues a call that ``unsupported`` has nothing against. Raises KernelError."""
        self.raise_on(self._functions.hstu_trt_launch_attention(params, KERNELS[kernel], stream), "attention")

    def launch_pack_values(self, params: AttentionParams, blocks: int, stream: int) -> None:
        """Enqueues the packing of fp8 values at the address ``blocks``. Raises KernelError."""
        self.raise_on(self._functions.hstu_trt_launch_pack_values(params, blocks, stream), "pack_values")

    def embedding_unsupported(self, params: EmbeddingParams) -> str | None:
        """Why a lookup cannot be done; None if it can."""
        sentence = self._functions.hstu_trt_embedding_unsupported(params)
        return sentence.decode() if sentence else None

    def launch_embedding_lookup(self, params: EmbeddingParams, stream: int) -> None:
        """Enqueues a lookup that ``embedding_unsupported`` has nothing against. Raises KernelError."""
        self.raise_on(self._functions.hstu_trt_launch_embedding_lookup(params, stream), "embedding_lookup")

    def launch_embedding_publish(self, live_tables: int, tables: int, stream: int) -> None:
        """Enqueues the exchange of the word at ``live_tables``. Raises KernelError."""
        error = self._functions.hstu_trt_launch_embedding_publish(live_tables, tables, stream)
        self.raise_on(error, "embedding_publish")

    def value_blocks(self, rows: int, users: int) -> int:
        """Blocks of one section of packed values (kernels/attention/value_blocks.h)."""
        return self._functions.hstu_trt_value_blocks(rows, users)

    def raise_on(self, error: int, what: str) -> None:
        """Raises KernelError if a launch has answered with another cudaError_t than success."""
        if error:
            name = self._functions.hstu_trt_error_name(error).decode()
            text = self._functions.hstu_trt_error_text(error).decode()
            raise KernelError(f"{what}: {name}: {text} (the library is built for {', '.join(self.archs)})")


def open_functions(path: Path, functions: Functions) -> Any:
    """The library at ``path``, with the types of these functions. Raises ArtefactError if it has not all of them."""
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in functions.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise ArtefactError(f"{path} is no library of these kernels ({error}): run `make plugins`") from None
    return library


def struct_differences(fields: list[Any], size: int, mirror: type[Structure]) -> list[str]:
    """Sentences on where a struct of the library, its ``Field`` list and its bytes, is not the mirror."""
    theirs = {field.name.decode(): (field.offset, field.size) for field in fields}
    ours = {name: (getattr(mirror, name).offset, getattr(mirror, name).size) for name, *_ in mirror._fields_}
    found = []
    if list(theirs) != list(ours):
        found.append(f"{mirror.__name__}: fields {sorted(set(theirs) ^ set(ours)) or 'in another order'}")
    found += [
        f"{mirror.__name__}: field {name} at offset, size {theirs[name]}, not {place}"
        for name, place in ours.items()
        if theirs.get(name, place) != place
    ]
    if size != ctypes.sizeof(mirror):
        found.append(f"{mirror.__name__}: parameters of {size} bytes, not {ctypes.sizeof(mirror)}")
    return found


@functools.cache
def load_library() -> KernelLibrary:
    """The library that HSTU_TRT_LIB names, else the one in build/lib. Raises ArtefactError if there is none."""
    named = os.environ.get(LIBRARY_VARIABLE)
    return KernelLibrary(Path(named) if named else LIBRARY_FOLDER / LIBRARY)
