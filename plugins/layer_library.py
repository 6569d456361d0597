"""The layer kernels of libhstu_trt_kernels.so through ctypes: mirrors of their parameters, and their launch."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from typing import ClassVar

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.plugins.library import KernelError, UnsupportedError, load_library

MAX_ACTIONS = 12
"""``kMaxActions`` of kernels/layer/params.h."""
MAX_PROJECTIONS = 4
"""``kMaxProjections``."""
MAX_PROJECT_INPUTS = 512
"""``kMaxProjectInputs``."""
MAX_ROW_WIDTH = 2048
"""``kMaxRowWidth``."""


class RowsOut(Structure):
    """``RowsOut`` of kernels/layer/params.h."""

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("scale", c_float), ("type", c_int32))


class QuantiseSegment(Structure):
    """``QuantiseSegment``."""

    _fields_ = (("x", c_void_p), ("out", RowsOut), ("x_stride", c_int64), ("rows", c_int32), ("width", c_int32))


class RowChoice(Structure):
    """``RowChoice``."""

    _fields_ = (("rows", c_void_p), ("index", c_void_p), ("count", c_int64))


def _fields(pointers: str, others: list[tuple[str, type]], numbers: str) -> list[tuple[str, type]]:
    """Pointers, then fields of other types, then 32-bit integers; ``eps`` is a float."""
    kinds = {"eps": c_float, "norm_eps": c_float}
    return [
        *((name, c_void_p) for name in pointers.split()),
        *others,
        *((name, kinds.get(name, c_int32)) for name in numbers.split()),
    ]


def _strides(*names: str) -> list[tuple[str, type]]:
    return [(f"{name}_stride", c_int64) for name in names]


class LayerParams(Structure):
    """Parameters of a layer kernel; a subclass mirrors a struct of kernels/layer/params.h, field by field."""

    kernel: ClassVar[int]
    """Its number in capi/layer.h."""


class NormRowsParams(LayerParams):
    """``NormRowsParams``."""

    kernel = 0
    _fields_ = _fields(
        "x delta sum gain bias factor", [("out", RowsOut), *_strides("x", "delta", "sum", "factor")],
        "rows width swish eps",
    )  # fmt: skip


class GateParams(LayerParams):
    """``GateParams``."""

    kernel = 1
    _fields_ = _fields(
        "u attention gain bias", [("joined", RowsOut), *_strides("u", "attention")],
        "rows width heads group_norm keep_attention eps",
    )  # fmt: skip


class QuantiseRowsParams(LayerParams):
    """``QuantiseRowsParams``."""

    kernel = 2
    _fields_ = (("segments", QuantiseSegment * 3), ("count", c_int32))


class EncodeTokensParams(LayerParams):
    """``EncodeTokensParams``."""

    kernel = 3
    _fields_ = (
        *_fields("content gain bias", [("extra", RowChoice)], ""),
        *_fields(
            "actions_table actions contextual position_table time_table timestamps prefix_offsets candidate_offsets "
            "norm_gain norm_bias x",
            [("normed", RowsOut), ("action_masks", c_int64 * MAX_ACTIONS)],
            "action_count tokens prefix_tokens users slots width last_position last_bucket eps norm_eps",
        ),
    )


class UserVectorsParams(LayerParams):
    """``UserVectorsParams``."""

    kernel = 4
    _fields_ = _fields(
        "x gain bias time_weight timestamps users items item_gain item_bias", [("product", RowsOut), *_strides("x")],
        "rows width kind eps",
    )  # fmt: skip


class ScoresParams(LayerParams):
    """``ScoresParams``."""

    kernel = 5
    _fields_ = _fields(
        "hidden gain bias weight weight_bias scores", [("stride", c_int64)], "rows width tasks binary eps"
    )


class ProjectParams(LayerParams):
    """``ProjectParams``."""

    kernel = 6
    _fields_ = (
        *_fields("x weight column_scale bias", [("outs", RowsOut * MAX_PROJECTIONS)], ""),
        ("widths", c_int32 * MAX_PROJECTIONS),
        *_fields("", _strides("x"), "rows inputs count"),
    )


LAYER_KERNELS: tuple[type[LayerParams], ...] = (
    NormRowsParams, GateParams, QuantiseRowsParams, EncodeTokensParams, UserVectorsParams, ScoresParams,
    ProjectParams,
)  # fmt: skip


class _Field(Structure):
    _fields_ = (("name", c_char_p), ("offset", c_size_t), ("size", c_size_t))


class LayerLibrary:
    """The layer kernels. Raises ArtefactError where the library has none, or of other parameters than the mirrors."""

    def __init__(self) -> None:
        path = load_library().path
        try:
            functions = ctypes.CDLL(str(path))
            self._size = functions.hstu_trt_layer_params_size
            self._fields = functions.hstu_trt_layer_params_fields
            self._unsupported = functions.hstu_trt_layer_unsupported
            self._launch = functions.hstu_trt_launch_layer
            self._error_name = functions.hstu_trt_error_name
        except AttributeError as error:
            raise ArtefactError(f"{path} has no layer kernels ({error}): run `make plugins`") from None
        self._size.restype, self._size.argtypes = c_size_t, [c_int32]
        self._fields.restype, self._fields.argtypes = c_size_t, [c_int32, POINTER(POINTER(_Field))]
        self._unsupported.restype, self._unsupported.argtypes = c_char_p, [c_int32, c_void_p]
        self._launch.restype, self._launch.argtypes = c_int32, [c_int32, c_void_p, c_void_p]
        self._error_name.restype, self._error_name.argtypes = c_char_p, [c_int32]
        if differences := [text for mirror in LAYER_KERNELS for text in self.differences(mirror)]:
            raise ArtefactError(f"{path} is of other sources ({differences[0]}): run `make plugins`")

    def differences(self, mirror: type[LayerParams]) -> list[str]:
        """Sentences on where the library's struct is not the mirror; none if they are the same."""
        fields = POINTER(_Field)()
        count = self._fields(mirror.kernel, ctypes.byref(fields))
        theirs = [(fields[n].name.decode(), fields[n].offset, fields[n].size) for n in range(count)]
        ours = [(name, getattr(mirror, name).offset, getattr(mirror, name).size) for name, *_ in mirror._fields_]
        found = [f"{mirror.__name__}: {a}, not {b}" for a, b in zip(theirs, ours, strict=False) if a != b]
        if len(theirs) != len(ours) or self._size(mirror.kernel) != ctypes.sizeof(mirror):
            found.append(f"{mirror.__name__}: {len(theirs)} fields, {self._size(mirror.kernel)} bytes")
        return found

    def unsupported(self, params: LayerParams) -> str | None:
        """Why a kernel cannot do a call; None if it can. Reads no device memory."""
        sentence = self._unsupported(params.kernel, ctypes.byref(params))
        return sentence.decode() if sentence else None

    def launch(self, params: LayerParams, stream: int) -> None:
        """Enqueues a call. Raises UnsupportedError or KernelError."""
        error = self._launch(params.kernel, ctypes.byref(params), stream)
        if error:
            name = type(params).__name__
            if sentence := self.unsupported(params):
                raise UnsupportedError(f"{name}: {sentence}")
            raise KernelError(f"{name}: {self._error_name(error).decode()}")


@functools.cache
def load_layer_library() -> LayerLibrary:
    """The layer kernels of ``load_library``. Raises ArtefactError if they are not there."""
    return LayerLibrary()
