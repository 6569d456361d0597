"""The guard of the server: its bounds, and where a server must not run without it."""

import os
import subprocess
import sys

import pytest

from hstu_trt.contract.errors import ConfigError
from hstu_trt.serving import guard
from hstu_trt.serving.guard import (
    door_environment,
    find_guard,
    guard_doors,
    guard_environment,
    guard_limits,
    guard_note,
    is_bounded,
    largest_request,
)
from hstu_trt.serving.server import LOOPBACK


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """Both libraries, in a folder of their own."""
    for name, file in (("LIBRARY", "guard.so"), ("FRONTEND", "frontend.so")):
        (tmp_path / file).write_bytes(b"\x7fELF ... HSTU_TRT_DOORS ... sem_clockwait ...")
        monkeypatch.setattr(guard, name, tmp_path / file)
    return tmp_path


def test_the_built_guard_is_found(libraries):
    assert find_guard("0.0.0.0", LOOPBACK) == libraries / "guard.so"


@pytest.mark.parametrize("missing", ["guard.so", "frontend.so"])
def test_without_it_nobody_else_is_let_in(libraries, missing):
    (libraries / missing).unlink()
    assert find_guard(LOOPBACK, LOOPBACK) is None
    with pytest.raises(ConfigError, match="make guard-lib"):
        find_guard("0.0.0.0", LOOPBACK)


@pytest.mark.parametrize("content", [b"", b" HSTU_TRT_DOORS", b" sem_clockwait"])
def test_one_of_an_earlier_build_counts_as_missing(libraries, content):
    """It would be loaded, and bound nothing, or leave the server to jumps of the clock."""
    (libraries / "frontend.so").write_bytes(b"\x7fELF" + content)
    assert door_environment("ranking=embedding_lookup:8+3") == {}
    assert find_guard(LOOPBACK, LOOPBACK) is None
    with pytest.raises(ConfigError, match="of this version"):
        find_guard("0.0.0.0", LOOPBACK)


def test_a_path_that_cannot_be_preloaded(libraries, monkeypatch):
    for name in ("LIBRARY", "FRONTEND"):
        target = libraries / "a folder" / getattr(guard, name).name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(getattr(guard, name).read_bytes())
        monkeypatch.setattr(guard, name, target)
    assert find_guard(LOOPBACK, LOOPBACK) is None


def test_every_model_has_a_bound_that_its_largest_request_keeps(make_model):
    model = make_model()
    bounds = {name: int(most) for name, _, most in (word.partition("=") for word in guard_limits(model).split())}
    assert set(bounds) == {"embedding_lookup", "hstu", "mlp_head", "ranking_fused"}
    for name, most in bounds.items():
        assert most > largest_request(model.specs[name])
    assert bounds["embedding_lookup"] > largest_request(model.specs["ranking"])


def test_the_largest_request(make_model):
    """24 events and 12 candidates of 2 ids, 4 users: see LIMITS."""
    spec = make_model().specs["embedding_lookup"]
    assert largest_request(spec) == 8 * (24 * 2 + 12 * 2 + 4 * 1)


def test_other_preloaded_libraries_stay(libraries, monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/lib/jemalloc.so")
    assert guard_environment("x=1")["LD_PRELOAD"] == f"{libraries / 'frontend.so'}:/lib/jemalloc.so"
    monkeypatch.delenv("LD_PRELOAD")
    assert guard_environment("x=1") == {"LD_PRELOAD": str(libraries / "frontend.so"), "HSTU_TRT_GUARD": "x=1"}


@pytest.mark.parametrize(
    ("flavour", "doors"),
    [
        ("cpu", "ranking=embedding_lookup:8+3 ranking_fused=ranking_fused:5+5"),
        ("tensorrt", "ranking=embedding_lookup:8+3 ranking_fused=ranking_fused:5+5"),
        ("cuda", "ranking=embedding_lookup:8+3"),
    ],
)
def test_the_requests_that_may_be_in_flight(flavour, doors, libraries, monkeypatch):
    assert guard_doors({"embedding_lookup": 8, "ranking_fused": 5}, flavour) == doors
    environment = door_environment(doors)
    assert environment["HSTU_TRT_DOORS"] == doors and environment["LD_PRELOAD"].startswith(str(libraries))
    monkeypatch.setenv("HSTU_TRT_DOORS", doors)
    assert is_bounded("embedding_lookup") and is_bounded("ranking_fused") == (flavour != "cuda")
    assert not is_bounded("hstu") and not is_bounded("ranking"), "where requests come in, no other"


def test_without_the_library_models_bound_what_waits(libraries, monkeypatch):
    (libraries / "frontend.so").unlink()
    assert door_environment("ranking=embedding_lookup:8+3") == {}
    monkeypatch.delenv("HSTU_TRT_DOORS", raising=False)
    assert not is_bounded("embedding_lookup")


def test_people_are_told_of_a_server_without_it(libraries):
    assert guard_note({}) == [], "an installed server refuses by itself"
    assert guard_note({"LD_LIBRARY_PATH": "x", **guard_environment("x=1")}) == []
    assert "make guard-lib" in guard_note({"LD_LIBRARY_PATH": "x"})[0]


OTHERS = """
import ctypes, time
libc, semaphore = ctypes.CDLL(None), ctypes.create_string_buffer(32)
libc.sem_init(semaphore, 0, 0)
def waited(seconds):
    due = time.time() + seconds
    moment = (ctypes.c_long * 2)(int(due), int(due % 1 * 1e9))
    began = time.monotonic()
    assert libc.sem_timedwait(semaphore, moment) == -1
    return time.monotonic() - began
assert waited(-1) < 20, "what has passed is not waited for"
assert waited(0.3) >= 0.29
"""


@pytest.mark.triton
def test_what_waits_beside_the_python_backend_keeps_its_time():
    """As the locks of Python 3.10 do; the Python backend's own are in tests/faults/test_clock_jumps.py."""
    assert guard.FRONTEND.is_file(), "make guard-lib"
    environment = {**os.environ, "LD_PRELOAD": str(guard.FRONTEND)}
    answer = subprocess.run(
        [sys.executable, "-c", OTHERS], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
