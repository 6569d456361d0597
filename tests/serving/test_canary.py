"""The first request to a new server: both models must answer, and agree where their tables are the same."""

from types import SimpleNamespace

import numpy as np
import pytest
from small_models import LIMITS, small_config

from hstu_trt.contract.errors import GateError
from hstu_trt.serving import banner, starting
from hstu_trt.serving.answers import Answer

# (scores, tables) of the ensemble and of the fused model in each turn -> the difference; GateError: refused
CASES = {
    "the same tables": ([((0.5, "v1@aa"), (0.5, "v1@aa"))], 0.0),
    "the same rows under two names": ([((0.5, "v1@aa"), (0.5, "small@aa"))], 0.0),
    "the same tables disagree": ([((0.52, "v1@aa"), (0.5, "v1@aa"))], GateError),
    "the same tables, not a number": ([((np.nan, "v1@aa"), (0.5, "v1@aa"))], GateError),
    "an engine's own tables": ([((0.52, "v2@bb"), (0.5, "small@aa"))] * 4, None),
    "published meanwhile": ([((0.52, "v2@bb"), (0.5, "v1@aa")), ((0.52, "v2@bb"), (0.52, "v2@bb"))], 0.0),
    "published meanwhile, and wrong": (
        [((0.52, "v2@bb"), (0.5, "v1@aa")), ((0.52, "v2@bb"), (0.5, "v2@bb"))],
        GateError,
    ),
}


@pytest.mark.parametrize(("turns", "expected"), CASES.values(), ids=CASES)
def test_scores_are_compared_where_the_tables_are_the_same(monkeypatch, turns, expected):
    answers = [answer for turn in turns for answer in zip(("ranking", "ranking_fused"), turn, strict=True)]

    class Client:
        def __init__(self, url, name, tls):
            self.name = name

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def ask(self, request):
            name, (score, tables) = answers.pop(0)
            assert name == self.name
            return Answer(np.full((3, 1), score, np.float32), tables, {})

    monkeypatch.setattr(starting, "RankingClient", Client)
    monkeypatch.setattr(starting, "_CANARY_PAUSE_S", 0)
    model = SimpleNamespace(ranking_config=small_config(), limits=LIMITS, tolerances="fp16")
    deployment = SimpleNamespace(model=model, served=("ranking", "ranking_fused"))
    if expected is GateError:
        with pytest.raises(GateError, match="ranking and ranking_fused disagree by"):
            starting._first_answer(deployment, "")
    else:
        difference = starting._first_answer(deployment, "")
        assert difference == expected
        ready = starting.Ready(version="2.51.0", seconds=1.0, canary_difference=difference)
        assert ("different tables" if expected is None else "agree within 0") in banner._check_text(deployment, ready)
    assert not answers
