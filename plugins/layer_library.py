"""The layer kernels of libhstu_trt_kernels.so through ctypes: mirrors of their parameters, and their launch."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_size_t, c_void_p
from typing import ClassVar

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.plugins.library import (
    Field,
    Functions,
    KernelLibrary,
    UnsupportedError,
    load_library,
    open_functions,
    struct_differences,
)

MAX_ACTIONS = 12
"""``kMaxActions`` of kernels/layer/params.h."""
MAX_PROJECTIONS = 4
"""``kMaxProjections``."""
MAX_PROJECT_INPUTS = 512
"""``kMaxProjectInputs``."""
PROJECT_WIDTH_STEP = 256
"""``kColumns`` of kernels/layer/project.h: outputs of ``project`` are as wide, or a multiple."""
PROJECT_INPUT_STEP = 128
"""``kPanelBytes``: so are its inputs."""


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


_FUNCTIONS: Functions = {
    "hstu_trt_layer_params_size": (c_size_t, [c_int32]),
    "hstu_trt_layer_params_fields": (c_size_t, [c_int32, POINTER(POINTER(Field))]),
    "hstu_trt_layer_unsupported": (c_char_p, [c_int32, c_void_p]),
    "hstu_trt_launch_layer": (c_int32, [c_int32, c_void_p, c_void_p]),
}


class LayerLibrary:
    """The layer kernels of a library. Raises ArtefactError where it has none, or others than the mirrors are of."""

    def __init__(self, library: KernelLibrary) -> None:
        self._library = library
        self._functions = open_functions(library.path, _FUNCTIONS)
        if differences := [text for mirror in LAYER_KERNELS for text in self.differences(mirror)]:
            raise ArtefactError(f"{library.path} is of other sources ({differences[0]}): run `make plugins`")

    def differences(self, mirror: type[LayerParams]) -> list[str]:
        """Sentences on where the library's struct is not the mirror; none if they are the same."""
        fields = POINTER(Field)()
        count = self._functions.hstu_trt_layer_params_fields(mirror.kernel, ctypes.byref(fields))
        size = self._functions.hstu_trt_layer_params_size(mirror.kernel)
        return struct_differences(fields[:count], size, mirror)

    def unsupported(self, params: LayerParams) -> str | None:
        """Why a kernel cannot do a call; None if it can. Reads no device memory."""
        sentence = self._functions.hstu_trt_layer_unsupported(params.kernel, ctypes.byref(params))
        return sentence.decode() if sentence else None

    def launch(self, params: LayerParams, stream: int) -> None:
        """Enqueues a call. Raises UnsupportedError or KernelError."""
        error = self._functions.hstu_trt_launch_layer(params.kernel, ctypes.byref(params), stream)
        name = type(params).__name__
        if error and (sentence := self.unsupported(params)):
            raise UnsupportedError(f"{name}: {sentence}")
        self._library.raise_on(error, name)


@functools.cache
def load_layer_library() -> LayerLibrary:
    """The layer kernels of ``load_library``. Raises ArtefactError if they are not there."""
    return LayerLibrary(load_library())
