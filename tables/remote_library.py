"""libhstu_trt_remote.so through ctypes: the functions and structures of ``csrc/remote/capi.h``."""

from __future__ import annotations

import ctypes
import functools
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError

LIBRARY = Path(__file__).resolve().parents[1] / "build/lib/libhstu_trt_remote.so"
ABI = 1
ERROR_BYTES = 512


class Options(Structure):
    """``HstuTrtRemoteOptions``."""

    _fields_ = (
        ("seeds", c_char_p),
        ("user", c_char_p),
        ("password", c_char_p),
        ("tls", c_int32),
        ("tls_authorities", c_char_p),
        ("tls_certificate", c_char_p),
        ("tls_key", c_char_p),
        ("breaker_failures", c_int32),
        ("breaker_open_us", c_int64),
        ("rows_per_command", c_int32),
        ("replica_reads", c_int32),
    )


class Job(Structure):
    """``HstuTrtRemoteJob``."""

    _fields_ = (
        ("table", c_void_p),
        ("rows", c_void_p),
        ("count", c_int64),
        ("values", c_void_p),
        ("stride", c_int64),
        ("status", c_void_p),
    )


REPLY = CFUNCTYPE(None, c_void_p, c_size_t, c_void_p)

_ERROR = [c_char_p, c_size_t]
_FUNCTIONS = {
    "abi": (c_int32, []),
    "open": (c_void_p, [POINTER(Options), c_int64, *_ERROR]),
    "close": (None, [c_void_p]),
    "table": (c_void_p, [c_char_p, c_uint32, c_uint32]),
    "table_free": (None, [c_void_p]),
    "read": (c_int32, [c_void_p, POINTER(Job), c_int32, c_int64, *_ERROR]),
    "write": (c_int32, [c_void_p, POINTER(Job), c_int64, *_ERROR]),
    "execute": (
        c_int32,
        [c_void_p, c_char_p, c_int32, POINTER(c_char_p), POINTER(c_size_t), c_int64, REPLY, c_void_p, *_ERROR],
    ),
    "nodes": (c_int32, [c_void_p, REPLY, c_void_p]),
    "counter_names": (c_char_p, []),
    "counters": (None, [c_void_p, POINTER(c_uint64)]),
    "partition": (c_uint32, [c_void_p, c_int64]),
    "slot": (c_int32, [c_char_p, c_size_t]),
}


class Library:
    """The functions by their name without the prefix."""

    def __init__(self, path: Path) -> None:
        loaded = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(loaded, f"hstu_trt_remote_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.counter_names = loaded.hstu_trt_remote_counter_names().decode().strip(",").split(",")

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:
        raise AttributeError(name)


@functools.cache
def remote_library() -> Library:
    """The library, loaded once. Raises ArtefactError naming the command that builds it."""
    if not LIBRARY.is_file():
        raise ArtefactError(f"{LIBRARY} is missing; build it with: make remote-lib")
    try:
        library = Library(LIBRARY)
    except (OSError, AttributeError) as error:
        raise ArtefactError(f"{LIBRARY} cannot be loaded ({error}); build it again with: make remote-lib") from None
    if library.abi() != ABI:
        raise ArtefactError(f"{LIBRARY} has ABI {library.abi()}, not {ABI}; build it again with: make remote-lib")
    return library
