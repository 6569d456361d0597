"""The build without building: what it runs, what it says when something is missing, and what it reads from ptxas."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.plugins import __main__ as command
from hstu_trt.plugins import build as building
from hstu_trt.plugins import toolchain
from hstu_trt.plugins.build import ALL_ARCHS, parse_archs
from hstu_trt.plugins.resources import KernelResources, Note, faults, parse_log, read_logs, short_name, table

SYMBOL = "_ZN8hstu_trt6kernelI6__halfEEvi"
LOG = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in '{SYMBOL}'
ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_90a'
ptxas info    : Function properties for {SYMBOL}
    40 bytes stack frame, 44 bytes spill stores, 56 bytes spill loads
ptxas info    : Used 168 registers, used 11 barriers, 40 bytes cumulative stack size, 16904 bytes smem
ptxas info    : Compile time = 3.1 ms
ptxas info    : Function properties for called_function
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'plain' for 'sm_80'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers
"""


def test_a_log_is_read() -> None:
    kernels, notes = parse_log("sm90_x.cu", LOG)
    assert kernels == [
        KernelResources("sm90_x.cu", SYMBOL, "sm_90a", 168, 44, 56, 40, 16904),
        KernelResources("sm90_x.cu", "plain", "sm_80", 32, 0, 0, 0, 0),
    ]
    assert [note.text[:7] for note in notes] == ["(C7510)"]


def test_logs_of_removed_objects_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "there.cu.o").touch()
    for name in ("there", "gone"):
        (tmp_path / f"{name}.cu.o.log").write_text(LOG)
    assert {kernel.source for kernel in read_logs(tmp_path)[0]} == {"there.cu"}


def test_spills_and_notes_are_faults_of_sm90_kernels_alone() -> None:
    for source, count in (("sm90_x.cu", 2), ("smxx_x.cu", 0)):
        assert len(faults(*parse_log(source, LOG))) == count
    assert faults([], [Note("sm90_x.cu", "(C7510) lost")]) == ["sm90_x.cu: (C7510) lost"]


def test_the_table_has_a_line_per_kernel() -> None:
    lines = table(parse_log("sm90_x.cu", LOG)[0]).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == [SYMBOL, "sm_90a", "168", "44", "56", "40", "16904"]


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("void hstu_trt::kernel<__half, (int)64, (bool)1>(hstu_trt::AttentionParams)", "kernel<fp16, 64, 1>"),
        ("hstu_trt::(anonymous namespace)::plan(hstu_trt::AttentionParams, int)", "plan"),
        ("void hstu_trt::sm90::f<hstu_trt::sm90::T<__nv_fp8_e4m3, 8> >(int (*)(int))", "sm90::f<sm90::T<fp8, 8>>"),
        ("plain", "plain"),
    ],
)
def test_names_are_short(signature: str, name: str) -> None:
    assert short_name(signature) == name


@pytest.mark.parametrize(
    ("text", "archs"), [("90a", ("90a",)), ("90a,80", ("80", "90a")), ("80;120a", ("80", "120a")), ("all", ALL_ARCHS)]
)
def test_archs_are_read(text: str, archs: tuple[str, ...]) -> None:
    assert parse_archs(text) == archs


@pytest.mark.parametrize("text", ["", "90", "80,h100"])
def test_unknown_archs_are_named(text: str) -> None:
    with pytest.raises(HstuTrtError, match="120a"):
        parse_archs(text)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, with everything that a build asks for; no CUDA anywhere else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("c++", "cmake", "ninja", "make"):
        write_program(folder / name, "exit 0")
    write_program(folder / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CUDACXX", "CUDA_HOME", "CXX", "LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(toolchain, "wheel_roots", list)
    monkeypatch.setattr(toolchain, "SYSTEM_CUDA", tmp_path / "no-cuda")
    return folder


def write_program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run(*arguments: str) -> int:
    return run_verb(command.main, list(arguments), "python -m hstu_trt.plugins")


def test_a_dry_run_runs_nothing(tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(building, "build", None)
    assert run("build", "--dry-run", "--json", "--archs", "80,90a", "--jobs", "3") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["archs"] == ["80", "90a"]
    assert facts["nvcc"] == str(tools / "nvcc")
    configure, compile_ = facts["commands"]
    assert "-G Ninja" in configure and "HSTU_TRT_CUDA_ARCHS=80;90a" in configure
    assert compile_.endswith("--parallel 3")
    assert run("build", "--dry-run") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_make_stands_in_for_ninja(tools: Path) -> None:
    (tools / "ninja").unlink()
    assert toolchain.find_toolchain().generator == "Unix Makefiles"


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        (["nvcc"], "nvcc, the CUDA compiler"),
        (["c++"], "a C++ compiler"),
        (["cmake"], "CMake"),
        (["ninja", "make"], "ninja"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(
    tools: Path, capsys: pytest.CaptureFixture, gone: list[str], named: str
) -> None:
    for name in gone:
        (tools / name).unlink()
    assert run("build") == 2
    shown = capsys.readouterr().err
    assert named in shown and "works without them" in shown
    assert "make plugins" in shown or "g++" in shown


def test_a_variable_that_names_nothing_is_an_error(
    tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert run("toolchain") == 2
    assert "CUDA_HOME=/nowhere: there is no nvcc at /nowhere/bin/nvcc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "said"),
    [("echo release 11.8, V11", "12.8 or later is needed"), ("exit 1", "does not run"), ("echo x", "no release")],
)
def test_an_nvcc_that_is_of_no_use(tools: Path, capsys: pytest.CaptureFixture, body: str, said: str) -> None:
    write_program(tools / "nvcc", body)
    assert run("toolchain") == 2
    assert said in capsys.readouterr().err


def test_the_wheels_serve_where_no_toolkit_is(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "nvidia/cu13"
    write_program(root / "bin/nvcc", "echo release 13.0, V13.0.88")
    (tools / "nvcc").unlink()
    monkeypatch.setattr(toolchain, "wheel_roots", lambda: [root])
    found = toolchain.find_toolchain()
    assert (found.nvcc, found.cuda) == (root / "bin/nvcc", "13.0")
    assert found.environment == {"LIBRARY_PATH": str(root / "lib")}


def test_a_failing_compiler_is_exit_code_1(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    write_program(tools / "cmake", "echo planted; exit 3")
    monkeypatch.setattr(building, "BUILD_FOLDER", tmp_path / "cmake")
    assert run("build") == 1
    shown = capfd.readouterr().err
    assert "planted" in shown and "failed with exit code 3" in shown


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of a build with one good kernel."""
    path = tmp_path / "record.json"
    monkeypatch.setattr(building, "RECORD", path)
    write_record(path, spills=0)
    return path


def write_record(path: Path, spills: int) -> None:
    kernel = KernelResources("sm90_x.cu", "f<fp16>", "sm_90a", 168, spills, spills, 0, 0)
    facts = {"archs": ["90a"], "tensorrt_headers": "10.14.1", "kernels": [dataclasses.asdict(kernel)], "notes": []}
    path.write_text(json.dumps(facts))


def test_report_and_check_read_the_record(record: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("report") == 0
    assert "f<fp16>" in capsys.readouterr().out
    assert run("report", "--json") == 0
    assert json.loads(capsys.readouterr().out)["kernels"][0]["registers"] == 168
    assert run("check") == 0
    assert "plugins for TensorRT 10, headers of 10.14.1" in capsys.readouterr().out
    write_record(record, spills=8)
    assert run("check") == 1
    assert "sm90_x.cu: f<fp16> spills 8 bytes" in capsys.readouterr().err


def test_no_record_names_what_makes_it(record: Path, capsys: pytest.CaptureFixture) -> None:
    record.unlink()
    assert run("check") == 2
    assert "`make plugins`" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"kernels": [', "{}", '{"kernels": [{"speed": 1}], "notes": []}', "[]"])
def test_a_damaged_record_is_said(record: Path, capsys: pytest.CaptureFixture, text: str) -> None:
    record.write_text(text)
    assert run("report") == 2
    assert "is no record of a build" in capsys.readouterr().err


def test_a_check_for_a_tensorrt_that_is_not_there(
    record: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert run("check", "--tensorrt") == 2
    assert "Python's tensorrt cannot be imported" in capsys.readouterr().err


def test_the_launcher_keeps_what_ptxas_says(tmp_path: Path) -> None:
    launcher = Path(building.ROOT) / "plugins/log_ptxas.sh"
    compiler = tmp_path / "compiler"

    def compile_with(status: int) -> subprocess.CompletedProcess[str]:
        write_program(
            compiler, f"echo 'ptxas info    : Used 1 registers' >&2; echo 'x.cu: warning: planted'; exit {status}"
        )
        command = [str(launcher), str(compiler), "-c", "x.cu", "-o", str(tmp_path / "x.o")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    good = compile_with(0)
    assert (good.returncode, good.stderr) == (0, "x.cu: warning: planted\n")
    assert "Used 1 registers" in (tmp_path / "x.o.log").read_text()
    assert compile_with(4).returncode == 4
    assert not (tmp_path / "x.o.log").exists()
