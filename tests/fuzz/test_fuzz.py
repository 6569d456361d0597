"""A short run of `make fuzz`: cases that are the same every time."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_python(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("fuzzer", "seconds"), [("fuzz_tables.py", 4), ("fuzz_loaders.py", 15)])
def test_damaged_files_are_refused_or_read(fuzzer, seconds):
    done = run_python(str(HERE / fuzzer), "--seconds", str(seconds), "--first", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    cases = re.search(r"(\d+) cases from 1 on, 0 faults", done.stdout)
    assert cases and int(cases[1]) > 100


def test_a_case_can_be_repeated():
    done = run_python(str(HERE / "fuzz_tables.py"), "--target", "settings", "--only", "17")
    assert done.returncode == 0, done.stderr
    assert "1 cases" in done.stdout


def test_the_guided_fuzzer_runs(tmp_path):
    pytest.importorskip("atheris", reason="no atheris: pip install 'hstu-trt[fuzz]', Python 3.11 or later")
    guided = [str(HERE / "fuzz_guided.py"), "--target", "model folder", "--seconds", "3", "--crashes", str(tmp_path)]
    done = run_python(*guided)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs and int(runs[1]) > 100
    assert not list(tmp_path.iterdir())


def test_damaged_input_to_readers_in_cpp(tmp_path):
    if shutil.which("make") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "fuzz_native"
    built = subprocess.run(
        ["make", "-s", f"FUZZ={program}", str(program)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("no libraries of the sanitizers")
    assert built.returncode == 0, built.stderr
    script = f"import pathlib, fuzz_tables; fuzz_tables.make_tables(pathlib.Path({str(tmp_path / 't')!r}), 0)"
    assert run_python("-c", script).returncode == 0
    # The sanitizers want to be the first library, whatever else is preloaded.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [program, tmp_path / "t", "1", "300"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 300\n") == 6
