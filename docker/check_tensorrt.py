"""Prints the version of the TensorRT in this image, and fails if hstu-trt cannot use it: run while the image is built.

Header and library must be of one major: the plugins are compiled against the header and loaded by the library.
"""

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OLDEST = {10: (10, 15), 11: (11, 0)}
# Where `make plugins` finds them too: the Makefile's OWN_HEADERS, plugins/cmake/FindTensorRT.cmake.
HEADERS = [
    Path("/usr/include/x86_64-linux-gnu/NvInferVersion.h"),
    Path("/usr/include/aarch64-linux-gnu/NvInferVersion.h"),
    Path("/usr/include/NvInferVersion.h"),
]


def header_version(text: str) -> str:
    """``11.4.0.106`` from NvInferVersion.h; 11.x defines NV_TENSORRT_MAJOR through TRT_MAJOR_ENTERPRISE."""
    parts = []
    for part in ("MAJOR", "MINOR", "PATCH", "BUILD"):
        found = re.search(rf"#define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)", text)
        if not found:
            sys.exit(f"NvInferVersion.h defines no {part} version")
        parts.append(found[1])
    return ".".join(parts)


def library_version(load: Callable[[str], Any] = ctypes.CDLL) -> tuple[int, int]:
    """Major and minor of libnvinfer, the newest first."""
    for major in sorted(OLDEST, reverse=True):
        try:
            number = load(f"libnvinfer.so.{major}").getInferLibVersion()
        except OSError:
            continue
        return number // 10000, number // 100 % 100
    sys.exit(f"no libnvinfer.so.{' or .'.join(map(str, OLDEST))} in this image: choose another TRITON_TAG")


def problem(header: str, library: tuple[int, int]) -> str | None:
    """Why this TensorRT cannot be used, or None."""
    if library[0] not in OLDEST or library < OLDEST[library[0]]:
        oldest = ", ".join(".".join(map(str, version)) for version in OLDEST.values())
        return f"TensorRT {library[0]}.{library[1]} is older than any of {oldest}: choose another TRITON_TAG"
    if tuple(map(int, header.split(".")[:2])) != library:
        return f"the header is of TensorRT {header}, the library of {library[0]}.{library[1]}"
    return None


def main() -> None:
    """Prints the header's version, or ends with what is wrong."""
    header = next((path for path in HEADERS if path.is_file()), None)
    if header is None:
        sys.exit("no NvInferVersion.h in this image: choose a TRITON_TAG that ends with -py3")
    version = header_version(header.read_text())
    wrong = problem(version, library_version())
    if wrong:
        sys.exit(wrong)
    print(version)


if __name__ == "__main__":
    main()
