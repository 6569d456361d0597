"""The command line: verbs, exit codes, and errors as one line."""

import importlib
import re
import subprocess
import sys

import pytest

from hstu_trt.contract import cli
from hstu_trt.contract.errors import ArtefactError, ConfigError, GateError, HstuTrtError, InputError


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_verb(capsys, flag):
    assert cli.main([flag]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.VERBS)


def test_no_verb_is_a_usage_error(capsys):
    assert cli.main([]) == 2
    assert "usage: hstu-trt" in capsys.readouterr().out


def test_an_unknown_verb_is_named(capsys):
    assert cli.main(["scrore"]) == 2
    assert "unknown verb 'scrore'" in capsys.readouterr().err


def fails_with(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("planted"), 2),
        (InputError("planted"), 2),
        (ArtefactError("planted"), 2),
        (HstuTrtError("planted"), 2),
        (GateError("planted"), 1),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, error, code):
    assert cli.run_verb(fails_with(error), [], "hstu-trt planted") == code
    assert capsys.readouterr().err == "hstu-trt planted: error: planted\n"


def test_an_unwritable_place_is_named(capsys, tmp_path):
    def write(argv):
        (tmp_path / "file" / "out").mkdir(parents=True)

    (tmp_path / "file").write_text("not a folder")
    assert cli.run_verb(write, [], "hstu-trt planted") == 2
    assert capsys.readouterr().err == f"hstu-trt planted: error: [Errno 20] Not a directory: '{tmp_path}/file/out'\n"


def test_an_interrupt_is_told(capsys):
    assert cli.run_verb(fails_with(KeyboardInterrupt()), [], "hstu-trt planted") == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError(), ModuleNotFoundError("", name="hstu_trt.gone")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        cli.run_verb(fails_with(error), [], "hstu-trt planted")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "hstu-trt export: interrupted\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch.nn"),
            2,
            f"hstu-trt export: error: Python package 'torch.nn' is not installed: {cli.INSTALL}\n",
        ),
    ],
)
def test_importing_a_room_may_fail_as_its_verb_may(monkeypatch, capsys, error, code, said):
    monkeypatch.setattr(importlib, "import_module", fails_with(error))
    assert cli.main(["export"]) == code
    assert capsys.readouterr().err == said


def test_a_verb_gets_its_arguments(monkeypatch):
    seen = []

    class Room:
        @staticmethod
        def main(argv):
            seen.extend(argv)
            return 7

    monkeypatch.setitem(cli.VERBS, "planted", ("hstu_trt.planted", "a planted verb"))
    monkeypatch.setattr(importlib, "import_module", lambda name: Room)
    assert cli.main(["planted", "--x", "1"]) == 7
    assert seen == ["--x", "1"]


def exit_code(argv):
    """What the process would end with; argparse leaves by SystemExit."""
    try:
        return cli.main(argv)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_tells_how_it_is_used(capsys, verb):
    assert exit_code([verb, "--help"]) == 0
    assert f"hstu-trt {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_wrong_option_is_exit_code_2(capsys, verb):
    assert exit_code([verb, "--no-such-option"]) == 2
    assert f"hstu-trt {verb}" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"hstu-trt \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("room", ["export", "plugins", "engines", "tables", "serving", "bench"])
def test_every_room_is_a_program(room):
    arguments = ["--help"] if room != "serving" else ["serve", "--help"]
    command = [sys.executable, "-m", f"hstu_trt.{room}", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "usage:" in result.stdout
