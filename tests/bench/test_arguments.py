"""What the benchmarks' command lines take: each suite tells its options, and refuses a wrong one in a sentence."""

import signal

import pytest

from hstu_trt.bench.__main__ import SUITES
from hstu_trt.bench.load.options import add_plan_options, plan_of
from hstu_trt.contract.cli import main as cli

COUNT, ABOVE, FROM_0 = "must be >= 1, got ", "must be > 0, got ", "must be >= 0, got "
WHOLE = "must be a whole number, got "
DEPLOYMENT, MODEL = ["--deployment", "nowhere"], ["--model", "nowhere"]
WRONG = {
    "kernels": [(["--rounds", "0"], COUNT), (["--measure-ms", "-5"], ABOVE), (["--pause-ms", "nan"], FROM_0)],
    "model": [
        (["--tokens", "abc"], WHOLE), (["--precisions", "fp7"], "unknown precisions fp7"),
        (["--references", "jax"], "unknown references jax"), (["--requests", "0"], COUNT),
    ],
    "gpu-accuracy": [(["--precisions", "fp32"], "unknown precisions fp32"), (["--weights", ""], "no weights")],
    "accuracy": [(["--requests", "0"], COUNT)],
    "plan-precision": [([*MODEL, "--out", "o", "--requests", "0"], COUNT)],
    "workload": [([*MODEL, "--out", "o", "--seed", "-1"], FROM_0)],
    "polygraphy": [([*MODEL, "--out", "o", "--requests", "-2"], COUNT)],
    "tables": [(["--zipf", "-1"], FROM_0), (["--rows", "1e9"], WHOLE)],
    "tables-gpu": [(["--parts", "gather,all"], "unknown parts all"), (["--table-gib", "inf"], ABOVE)],
    "remote": [(["--rounds", "0"], COUNT)],
    "refresh": [([*MODEL, "--clients", "0"], COUNT), ([*MODEL, "--gap", "-1"], FROM_0)],
    "serve": [
        ([*DEPLOYMENT, "--in-flight", "1,x"], WHOLE), ([*DEPLOYMENT, "--rates=-5"], ABOVE),
        ([*DEPLOYMENT, "--check", "0"], COUNT), ([*DEPLOYMENT, "--timeout", "0"], ABOVE),
        ([*DEPLOYMENT, "--scenarios", ""], "no scenarios: choose from single"),
    ],
    "overload": [([*DEPLOYMENT, "--profile", "bogus"], "invalid choice: 'bogus'")],
    "soak": [([*MODEL, "--profile", "bogus"], "invalid choice: 'bogus'"), ([*MODEL, "--seconds", "1"], "at least 20")],
    "in-process": [([*MODEL, "--clients", "2"], "unrecognized arguments: --clients")],
    "perf": [([*DEPLOYMENT, "--concurrency", "0"], COUNT), ([*DEPLOYMENT, "--rates", "x"], "must be a number, got ")],
    "side-by-side": [([*DEPLOYMENT, "--at-least", "0"], ABOVE), ([*DEPLOYMENT, "--reference", "no"], "nowhere")],
    "fuzz": [([*DEPLOYMENT, "--requests", "0"], COUNT)],
    "compare": [(["a", "b", "--floor", "-1"], FROM_0)],
    "plan": [(["--rate", "0", "--per-gpu", "5"], ABOVE)],
    "verify-tensorrt": [(["--precisions", "fp7", "--dry-run"], "unknown precisions fp7")],
    "demo": [(["--requests", "0"], COUNT)],
    "report": [(["--results", "no-such-file"], "cannot read no-such-file")],
}  # fmt: skip


def run(*argv):
    """The exit code, as the shell sees it."""
    try:
        return cli(["bench", *argv])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_tells_its_options(suite, capsys):
    assert run(suite, "--help") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: hstu-trt bench {suite} ") and len(said.splitlines()) > 5
    assert "``" not in said and "hstu-trt bench" not in said.replace(f"hstu-trt bench {suite} ", "", 1)


@pytest.mark.parametrize(
    ("suite", "argv", "said"), [(suite, argv, said) for suite, cases in WRONG.items() for argv, said in cases]
)
def test_a_wrong_option_is_named(suite, argv, said, capsys):
    assert run(suite, *argv) == 2
    text = capsys.readouterr().err
    assert said in text and len(text.splitlines()) == 1


def test_options_that_mean_nothing_are_left_out(capsys):
    import argparse

    parser = argparse.ArgumentParser()
    add_plan_options(parser, without=("clients", "probe_seconds"))
    args = parser.parse_args([])
    assert (args.clients, plan_of(args).probe_seconds) == (1, 5.0)
    with pytest.raises(SystemExit):
        parser.parse_args(["--clients", "2"])


def test_a_termination_unwinds_like_an_interrupt(monkeypatch):
    monkeypatch.setattr("hstu_trt.bench.compare.main", lambda argv: signal.raise_signal(signal.SIGTERM) or 0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run("compare") == 130
    finally:
        signal.signal(signal.SIGTERM, before)
