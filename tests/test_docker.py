"""The image's check of TensorRT, on planted versions; and what can be known of the Dockerfile without building it."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("check_tensorrt", ROOT / "docker" / "check_tensorrt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HEADER_10 = """
#define NV_TENSORRT_MAJOR 10 //!< TensorRT major version.
#define NV_TENSORRT_MINOR 15
#define NV_TENSORRT_PATCH 1
#define NV_TENSORRT_BUILD 29
"""
HEADER_11 = """
#define TRT_MAJOR_ENTERPRISE 11
#define TRT_MINOR_ENTERPRISE 4
#define TRT_PATCH_ENTERPRISE 0
#define TRT_BUILD_ENTERPRISE 106
#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE //!< TensorRT major version.
"""


@pytest.mark.parametrize(("text", "version"), [(HEADER_10, "10.15.1.29"), (HEADER_11, "11.4.0.106")])
def test_versions_of_headers(check, text, version):
    assert check.header_version(text) == version


def test_a_header_without_a_version(check):
    with pytest.raises(SystemExit, match="no PATCH version"):
        check.header_version(HEADER_11.replace("TRT_PATCH_ENTERPRISE 0", ""))


@pytest.mark.parametrize(("name", "number", "version"), [("11", 110400, (11, 4)), ("10", 101501, (10, 15))])
def test_the_version_of_a_library(check, name, number, version):
    def load(library):
        if library != f"libnvinfer.so.{name}":
            raise OSError(library)
        return SimpleNamespace(getInferLibVersion=lambda: number)

    assert check.library_version(load) == version


def test_no_library(check):
    def load(library):
        raise OSError(library)

    with pytest.raises(SystemExit, match=r"no libnvinfer.so.10 or .11"):
        check.library_version(load)


@pytest.mark.parametrize(
    ("header", "library", "said"),
    [
        ("10.15.1.29", (10, 15), None),
        ("11.4.0.106", (11, 4), None),
        ("10.14.1.48", (10, 14), "older than any of 10.15, 11.0"),
        ("8.6.1.6", (8, 6), "older"),
        ("10.16.0.1", (11, 4), "the header is of TensorRT 10.16.0.1, the library of 11.4"),
    ],
)
def test_what_the_image_must_hold(check, header, library, said):
    problem = check.problem(header, library)
    assert (problem is None) if said is None else said in problem


def test_headers_are_looked_for_where_the_build_finds_them(check):
    """Not where the image's check alone would find them, and `make plugins` then fetch others."""
    makefile = re.search(r"^OWN_HEADERS := .*\$\(wildcard (.+)\)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    suffixes = re.search(r"PATH_SUFFIXES (x86_64\S* \S+)\)", (ROOT / "plugins/cmake/FindTensorRT.cmake").read_text())
    by_cmake = {"/usr/include", *(f"/usr/include/{suffix}" for suffix in suffixes[1].split())}
    for path in check.HEADERS:
        assert any(path.with_name("NvInfer.h").match(pattern) for pattern in makefile[1].split()), path
        assert str(path.parent) in by_cmake


def test_the_dockerfile_names_what_exists():
    for line in re.findall(r"^COPY (?:--\S+ )*(.+)$", DOCKERFILE, flags=re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:RUN|hstu-trt) make ([a-z-]+)", DOCKERFILE)) <= targets


def test_the_image_runs_as_no_root_user():
    user = re.findall(r"^USER (\d+)", DOCKERFILE, flags=re.MULTILINE)[-1]
    assert int(user) > 0 and re.search(r"^ARG TRITON_TAG", DOCKERFILE, flags=re.MULTILINE)
