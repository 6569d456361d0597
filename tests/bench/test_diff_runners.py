"""``hstu-trt diff`` over two runners: on stand-ins whose faults are planted, and on the real ones."""

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hstu_trt.bench.diff import runners as diff_runners
from hstu_trt.bench.diff import sides as diff_sides
from hstu_trt.bench.diff.divergence import Errors, buckets, parse_edges, request_of_rows
from hstu_trt.bench.diff.page import page
from hstu_trt.bench.diff.runners import Options, measure
from hstu_trt.bench.diff.sides import PARTS, Side, coarser, tolerances
from hstu_trt.bench.files import write_features
from hstu_trt.bench.workloads.generate import generate
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.bench.workloads.requests_source import generate_requests, read_requests
from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.features import Jagged
from hstu_trt.contract.model_folder import ModelFolder

NORM = 512.0


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch, fake_runner, fake_model: ModelFolder):
    """``sides(fault)``: the reference and a runner that passes each stage's answers through ``fault(name, tensor)``."""

    class Faulty(fake_runner):
        fault = staticmethod(lambda name, tensor: tensor)

        def infer(self, feed):
            return {name: self.fault(name, tensor) for name, tensor in super().infer(feed).items()}

    def open_runner(kind, model, stage, device="cpu"):
        return fake_runner(model, stage) if kind == "exact" else Faulty(model, stage)

    monkeypatch.setattr(diff_sides, "open_runner", open_runner)

    def make(fault: Callable[[str, np.ndarray], np.ndarray] | None = None) -> tuple[Side, Side]:
        if fault is not None:
            Faulty.fault = staticmethod(fault)
        return Side(runner="exact", model=fake_model), Side(runner="faulty", model=fake_model)

    return make


def report_of(sides: tuple[Side, Side], parts=PARTS, count: int = 40):
    requests = generate_requests(sides[0].model, profile="ci", count=count, seed=1)
    return measure(*sides, requests, Options(norm=NORM, parts=parts, seed=1))


def test_alike_runners_pass(sides) -> None:
    report = report_of(sides())
    assert report.passed and report.divergence() == "no output is beyond its tolerance"
    assert [output.name for output in report.outputs] == [
        "uih_embeddings",
        "candidate_embeddings",
        "contextual_embeddings",
        *(f"stu.{layer}.out" for layer in range(report_layers(report))),
        "user_embeddings",
        "preds",
        "ranking_fused.preds",
    ]
    facts = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert facts["passed"] and facts["first_beyond"] is None and facts["requests"] == 40
    assert "PASSED" in report.text() and len(report.text().splitlines()) <= 45


def report_layers(report) -> int:
    return sum(output.name.startswith("stu.") for output in report.outputs)


# what goes wrong in B -> first output beyond its tolerance, and what else must be said
FAULTS = {
    "a layer": (lambda n, t: t + np.float32(n.startswith("stu.1") * 0.01), "stu.1.out", r"stu.1.out: max .*0\.01"),
    "from a layer on": (
        lambda n, t: t + np.float32(0.01) if n in ("stu.1.out", "user_embeddings", "preds") else t,
        "stu.1.out",
        "task .*request_max_logit",
    ),
    "table rows": (lambda n, t: t + np.float32(1e-6 if n == "uih_embeddings" else 0), "uih_embeddings", "tolerance 0,"),
    "scores alone": (lambda n, t: t * np.float32(0.99 if n == "preds" else 1), "preds", "preds: max"),
    "a NaN": (lambda n, t: np.where(t == t.flat[0], np.nan, t) if n == "preds" else t, "preds", "NaN or Inf on one"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_fault_is_named(sides, name: str) -> None:
    fault, first, said = FAULTS[name]
    report = report_of(sides(fault))
    assert not report.passed and report.as_json()["first_beyond"] == first
    assert re.search(said, "\n".join(report.failures()))
    assert report.divergence().startswith(f"first beyond its tolerance: {first}")
    assert "BEYOND" in report.text() and "Beyond a gate" in page(report)
    json.dumps(report.as_json(), allow_nan=False)


def test_the_worst_request_and_its_bucket_are_found(sides) -> None:
    """Only users with the longest history are wrong, so only the last bucket is."""
    requests = generate_requests(sides()[0].model, profile="ci", count=40, seed=1)
    longest = int(requests.history_lengths.argmax())
    seen = []

    def fault(name: str, tensor: np.ndarray) -> np.ndarray:
        if name != "preds":
            return tensor
        seen.append(len(tensor))
        rows = np.arange(sum(seen) - len(tensor), sum(seen))
        first, last = requests.candidate_offsets[longest : longest + 2]
        return tensor + np.float32(0.01) * ((rows >= first) & (rows < last))[:, None]

    report = report_of(sides(fault), parts=())
    assert report.output("preds").worst_request == longest
    verdicts = [row[-1] for row in report.bucket_rows()]
    assert verdicts[-1] == "BEYOND" and set(verdicts[:-1]) == {"ok"}
    assert f"request {longest} (" in "\n".join(report.failures())


def test_parts_can_be_left_out(sides) -> None:
    names = {output.name for output in report_of(sides(), parts=()).outputs}
    assert "preds" in names and not any(name.startswith(("stu.", "ranking_fused")) for name in names)


def test_other_shapes_and_missing_layers_are_refused(sides) -> None:
    with pytest.raises(InputError, match=r"preds has shape \[\d+, 2\] by faulty fp32"):
        report_of(sides(lambda n, t: np.repeat(t, 2, axis=1) if n == "preds" else t), parts=())


class Tags(HTMLParser):
    """Open tags, and whether every one is closed in its order."""

    VOID = ("meta", "rect", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_stands_alone(sides) -> None:
    html = page(report_of(sides(lambda n, t: t * np.float32(0.9999 if n == "preds" else 1))))
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and tags.seen.count("svg") == 4 and tags.seen.count("table") == 5
    assert "script" not in tags.seen and not re.search(r"(src|href)=|url\(|@import", html)
    assert "width=device-width" in html and "prefers-color-scheme: dark" in html and "nan" not in html.lower()


@pytest.mark.parametrize("text", ["", "1,2", "0,5,5", "0,x", "0,9,3"])
def test_buckets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="rising lengths that begin with 0"):
        parse_edges(text)


def test_every_request_is_in_one_bucket() -> None:
    found = buckets(np.array([0, 1, 15, 16, 70, 3]), parse_edges("0,1,16,64"))
    assert [(b.label, b.rows.tolist()) for b in found] == [
        ("0", [0]),
        ("1-15", [1, 2, 5]),
        ("16-63", [3]),
        ("64+", [4]),
    ]


def test_errors_stay_with_their_request() -> None:
    expected = np.array([[1.0, 2.0], [3.0, np.inf], [4.0, np.nan], [0.0, 0.0]])
    actual = np.array([[1.0, 2.5], [3.0, np.inf], [4.0, 1.0], [0.25, 0.0]])
    errors = Errors.of(actual, expected, np.array([0, 0, 2, 2]), 3)
    assert errors.max_abs.tolist() == [0.5, 0, 0.25] and errors.mismatches.tolist() == [0, 0, 1]
    assert errors.among(np.array([0])).relative_l2 == pytest.approx(0.5 / np.sqrt(1 + 4 + 9))
    assert errors.among(np.array([1])).relative_l2 == 0


def test_whose_each_row_is() -> None:
    packed = {"uih_offsets": np.array([0, 2, 2]), "candidate_offsets": np.array([0, 1, 3])}
    cases = {
        "uih_embeddings": [0, 0],
        "contextual_embeddings": [0, 1],
        "stu.0.out": [0, 0, 0, 1, 0, 1, 1],
        "preds": [0, 1, 1],
    }
    for name, wanted in cases.items():
        assert request_of_rows(name, packed, slots=1).tolist() == wanted


def test_tolerances_are_those_of_the_coarser_precision(fake_model: ModelFolder) -> None:

    half = Side(runner="torch", model=dataclasses.replace(fake_model, precision="fp16"))
    full = Side(runner="torch", model=fake_model)
    assert coarser("fp16", "fp32") == "fp16" and coarser("fp8", "fp16") == "fp8"
    assert tolerances(full, half, PARTS) == tolerances(half, full, PARTS)
    assert tolerances(full, half, ())["preds"] > tolerances(full, full, ())["preds"]
    assert "uih_embeddings" not in tolerances(full, half, ()) and tolerances(half, half, ())["uih_embeddings"] == 0


def test_a_file_of_features_leaves_out_users_without_candidates(fake_model: ModelFolder, tmp_path: Path) -> None:
    config = fake_model.ranking_config
    uih, candidates = generate(PROFILES["ci"](), config, limits=fake_model.limits).batch(config, [0, 1, 2])
    emptied = {n: Jagged(f.values[f.lengths[0] :], np.array([0, *f.lengths[1:]])) for n, f in candidates.items()}
    write_features(tmp_path / "in.safetensors", uih, emptied)
    requests = read_requests(tmp_path / "in.safetensors", config)
    assert len(requests) == 2
    both = requests.pack([1, 0])
    assert np.diff(both["uih_offsets"]).tolist() == requests.history_lengths[[1, 0]].tolist()
    assert both["candidate_offsets"][-1] == len(both["candidate_ids"]) == requests.candidate_counts.sum()


def test_real_runners(exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model-a", str(exported("fp32")), "--model-b", str(exported("fp16"))]
    capsys.readouterr()
    code = main(["diff", *models, "--requests", "20", "--buckets", "0,16", "--out", str(tmp_path / "out"), "--json"])
    report = json.loads(capsys.readouterr().out)
    # Twenty requests are too few for the aggregate gates, so only the outputs count here.
    assert all(output["passed"] for output in report["outputs"]) and report["first_beyond"] is None
    assert code == (0 if report["passed"] else 1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"diff.html", "diff.json", "diff.txt"}
    assert json.loads((tmp_path / "out" / "diff.json").read_text()) == report
    assert [bucket["history"] for bucket in report["buckets"]] == ["0-15", "16+"]


def test_what_cannot_be_compared_is_refused(
    exported: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", str(exported("fp32")), "--out", str(tmp_path)]
    cases = {
        ("--model-a", str(exported("fp32")), "--out", str(tmp_path)): "give --model, or both",
        (*model, "--a", "gpu"): "unknown runner 'gpu'",
        (*model, "--inputs", str(tmp_path / "none.npz")): "no workload at",
        (*model, "--attention-norm", "0"): "expected fixed:<N>",
    }
    for arguments, said in cases.items():
        assert main(["diff", *arguments]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (None, None)),
        (["--engines", "e"], ("e", "e")),
        (["--engines-a", "ea", "--engines-b", "eb"], ("ea", "eb")),
        (["--engines", "e", "--engines-b", "eb"], ("e", "eb")),
        (["--a", "torch", "--engines", "e", "--engines-a", "ea"], (None, "e")),
    ],
)
def test_each_side_has_its_engines(exported, monkeypatch, tmp_path, options, expected) -> None:
    seen: list[Side] = []

    def stop(a: Side, b: Side, *_) -> None:
        seen.extend((a, b))
        raise ConfigError("seen enough")

    monkeypatch.setattr(diff_runners, "measure", stop)
    command = ["diff", "--model", str(exported("fp32")), "--a", "tensorrt", "--b", "tensorrt", "--requests", "2"]
    assert main([*command, *options, "--out", str(tmp_path / "out")]) == 2
    assert [side.engines for side in seen] == [None if name is None else Path(name) for name in expected]
