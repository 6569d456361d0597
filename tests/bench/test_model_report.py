"""The whole model's table in docs/speed.md: ours from the committed rows, beside PyTorch."""

from pathlib import Path

import pytest

from hstu_trt.bench.model.report import FILES, model_table
from hstu_trt.bench.result_rows import RESULTS, read_rows
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ArtefactError

SPEED_PAGE = Path(__file__).parents[2] / "docs" / "speed.md"


def committed():
    return read_rows(sorted(path for pattern in FILES for path in RESULTS.glob(pattern)))


def test_the_page_shows_the_committed_rows():
    assert model_table(committed()) in SPEED_PAGE.read_text(), "make speed-page puts the newest rows there"


def test_baselines_have_no_line_of_their_own():
    lines = model_table(committed()).splitlines()[4:]
    assert lines and not any("torch" in line for line in lines)


def test_the_command_prints_it(capsys):
    assert main(["bench", "table-model"]) == 0
    assert capsys.readouterr().out == model_table(committed()) + "\n"


def test_without_rows_there_is_nothing_to_show():
    with pytest.raises(ArtefactError, match="make bench-model"):
        model_table([])
