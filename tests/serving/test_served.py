"""A deployment holds what it serves and nothing else, and everything that is made for it follows."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from made_engines import make_engines

from hstu_trt.bench.load.options import add_served_option, served_of
from hstu_trt.contract.errors import ArtefactError, ConfigError, GateError
from hstu_trt.contract.manifest import MANIFEST_NAME
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving import assemble_command, banner, lint, pbtxt, starting
from hstu_trt.serving.answers import Answer
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.cuda_steps import CudaSettings
from hstu_trt.serving.deployment import read_deployment
from hstu_trt.serving.engine_steps import stages_of
from hstu_trt.serving.guard import DOORS_VARIABLE, LIMITS_VARIABLE, guard_doors, guard_limits
from hstu_trt.serving.reference_answer import FILE, allowed_difference, reference_of
from hstu_trt.serving.served import SERVED, models_of, parse_served
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch
from hstu_trt.serving.tier_report import memory_note, placed_tables

STEPS = ("embedding_lookup", "hstu", "mlp_head")
# what is served -> the models of the repository
CHOICES = {
    ("ranking",): {*STEPS, "ranking"},
    ("ranking_fused",): {"ranking_fused"},
    ("ranking", "ranking_fused"): {*STEPS, "ranking", "ranking_fused"},
}
FLAVOURS = ("cpu", "cuda", "tensorrt")
EACH = pytest.mark.parametrize("served", CHOICES, ids=",".join)


@pytest.fixture(scope="module")
def made(exported, tmp_path_factory):
    """``made(served, flavour)`` is a deployment, assembled once."""
    model, folder, known = read_model_folder(exported("fp32")), tmp_path_factory.mktemp("served"), {}

    def make(served, flavour="cpu"):
        if (served, flavour) not in known:
            options = {
                "cpu": {},
                "cuda": {"cuda": CudaSettings(device="cpu")},
                "tensorrt": {"engines": folder / "engines"},
            }[flavour]
            if flavour == "tensorrt" and not (folder / "engines").exists():
                make_engines(folder / "engines", model)
            out = folder / f"{flavour}-{'-'.join(served)}"
            known[served, flavour] = assemble(model, out, Options(served=served, flavour=flavour, **options))
        return known[served, flavour]

    return make


@pytest.mark.parametrize(
    ("text", "served"),
    [("ranking", ("ranking",)), ("ranking_fused", ("ranking_fused",)), ("ranking_fused,ranking", SERVED)],
)
def test_names_are_read_in_any_order(text, served):
    assert parse_served(text) == served


@pytest.mark.parametrize("text", ["", "hstu", "ranking,", "ranking,ranking", "ranking ", "both", "ranking,hstu"])
def test_what_cannot_be_served_is_refused(text):
    with pytest.raises(ConfigError, match="cannot be served: give ranking, ranking_fused, or ranking,ranking_fused"):
        parse_served(text)


@pytest.mark.parametrize("flavour", FLAVOURS)
@EACH
def test_nothing_is_there_but_what_is_served(made, served, flavour):
    deployment = made(served, flavour)
    folders = {path.name for path in deployment.repository.iterdir()}
    assert folders == set(pbtxt.read_repository(deployment.repository)) == set(models_of(served)) == CHOICES[served]
    assert deployment.served == served
    assert set(deployment.queue) == {"embedding_lookup", "ranking_fused"} & CHOICES[served]
    plans = {path.parents[1].name for path in deployment.repository.glob("*/1/model.plan")}
    assert plans == ({"hstu", "mlp_head"} & CHOICES[served] if flavour == "tensorrt" else set())
    assert lint.lint(deployment.repository, deployment.model, flavour, served) == []
    assert (deployment.path / FILE).is_file() == (len(served) == 1)
    document = json.loads((deployment.path / MANIFEST_NAME).read_text())
    assert document["served"] == list(served)
    assert {name for name in document["files"] if name == FILE} == ({FILE} if len(served) == 1 else set())


@EACH
def test_the_command_of_the_manifest_makes_the_same_again(made, served, tmp_path, capsys):
    command = json.loads((made(served).path / MANIFEST_NAME).read_text())["made_by"].split()[2:]
    assert ("--served" in command) == (len(served) == 1), "the default is left out"
    assert assemble_command.main([*command[:-1], str(tmp_path / "again"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["served"], set(told["models"])) == (list(served), CHOICES[served])
    assert read_deployment(tmp_path / "again").served == served


def test_both_are_the_default(made):
    assert Options().served == SERVED == ("ranking", "ranking_fused")
    assert made(SERVED).served == SERVED


@pytest.mark.parametrize(
    ("served", "has_tiers", "stages"),
    [
        (SERVED, False, {"hstu", "mlp_head", "ranking_fused"}),
        (("ranking",), False, {"hstu", "mlp_head"}),
        (("ranking_fused",), False, {"ranking_fused"}),
        (("ranking_fused",), True, {"hstu", "mlp_head"}),
    ],
)
def test_engines_of_what_is_not_served_need_not_be_there(exported, tmp_path, served, has_tiers, stages):
    assert set(stages_of(served, has_tiers=has_tiers)) == stages
    model = read_model_folder(exported("fp32"))
    tiers = {}
    if has_tiers:
        (tmp_path / "tiers.json").write_text(json.dumps({"default": {"tier": "mapped"}}))
        tiers = {"tiers": tmp_path / "tiers.json"}
    for name, given in (("enough", stages), ("less", stages - {min(stages)})):
        engines = make_engines(tmp_path / name, model, stages=tuple(sorted(given)))
        options = Options(served=served, flavour="tensorrt", engines=engines, **tiers)
        if name == "enough":
            assert set(read_deployment(assemble(model, tmp_path / "out", options).path).served) == set(served)
        else:
            with pytest.raises(ArtefactError, match=f"no engine of {min(stages)}"):
                assemble(model, tmp_path / "none", options)


def changed_manifest(deployment, folder, **facts):
    """A copy whose manifest says something else; None takes a fact out."""
    shutil.copytree(deployment.path, folder, symlinks=True)
    document = json.loads((folder / MANIFEST_NAME).read_text()) | facts
    document = {name: fact for name, fact in document.items() if fact is not None}
    (folder / MANIFEST_NAME).write_text(json.dumps(document))
    return folder


def test_a_manifest_of_before_serves_both(made, tmp_path):
    folder = changed_manifest(made(SERVED), tmp_path / "old", served=None)
    assert read_deployment(folder).served == SERVED


@pytest.mark.parametrize("wrong", [[], ["hstu"], ["ranking", "ranking"], "ranking", 5, [[]], {"ranking": 1, "x": 2}])
def test_a_manifest_that_names_something_else_is_refused(made, tmp_path, wrong):
    folder = changed_manifest(made(SERVED), tmp_path / "wrong", served=wrong)
    with pytest.raises(ArtefactError, match=r"'served' in its manifest: .*make it again with: hstu-trt assemble"):
        read_deployment(folder)


def test_a_manifest_and_its_models_go_together(made, tmp_path):
    """More, or less, than is served: the lint says which."""
    both = {"served": list(SERVED), "queue": {"embedding_lookup": 8, "ranking_fused": 8}}
    less = changed_manifest(made(("ranking_fused",)), tmp_path / "less", **both)
    with pytest.raises(GateError, match="R12-contract: hstu is missing; assemble the deployment again"):
        starting.check(read_deployment(less))
    more = changed_manifest(made(SERVED), tmp_path / "more", served=["ranking_fused"])
    with pytest.raises(GateError, match="R18-not-served: ranking belongs to nothing that is served; remove its folder"):
        starting.check(read_deployment(more))


def test_every_door_has_its_places(made, tmp_path):
    """Without them the guard would bound nothing."""
    folder = changed_manifest(made(SERVED), tmp_path / "wrong", queue={"embedding_lookup": 8})
    with pytest.raises(ArtefactError, match="its manifest lacks 'ranking_fused'"):
        read_deployment(folder)


DOORS = {"ranking": "ranking=embedding_lookup:8+3", "ranking_fused": "ranking_fused=ranking_fused:8+8"}


@EACH
def test_the_guard_bounds_what_is_served(made, served):
    deployment = made(served)
    bounded = {word.partition("=")[0] for word in guard_limits(deployment.model, served).split()}
    assert bounded == CHOICES[served] - {"ranking"}
    assert guard_doors(deployment.queue, "cpu") == " ".join(DOORS[name] for name in served)
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0))
    if LIMITS_VARIABLE in plan.environment:
        assert plan.environment[LIMITS_VARIABLE] == guard_limits(deployment.model, served)
        assert plan.environment[DOORS_VARIABLE] == " ".join(DOORS[name] for name in served)


def test_micro_batches_bound_themselves(made):
    """With ``ranking_fused`` alone on a GPU there is nothing left for the guard to count."""
    deployment = made(("ranking_fused",), "cuda")
    assert guard_doors(deployment.queue, "cuda") == ""
    assert DOORS_VARIABLE not in plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0)).environment


def test_memory_is_that_of_what_is_served(made, exported, tmp_path):
    tables = sum(table.bytes for table in placed_tables(made(SERVED)))
    (tmp_path / "tiers.json").write_text(json.dumps({"default": {"tier": "resident"}}))
    for served, processes in ((SERVED, 2), (("ranking",), 1), (("ranking_fused",), 1)):
        options = Options(served=served, tiers=tmp_path / "tiers.json")
        deployment = assemble(read_model_folder(exported("fp32")), tmp_path / "-".join(served), options)
        assert sum(table.memory for table in placed_tables(deployment)) == processes * tables
    assert "in embedding_lookup and in ranking_fused" in memory_note(made(SERVED, "cuda"))
    alone = memory_note(made(("ranking_fused",), "cuda"))
    assert "in ranking_fused; a CUDA context for each of ranking_fused" in alone and "in all" not in alone


def test_a_command_that_sends_load_takes_what_is_served(made):
    import argparse

    parser = argparse.ArgumentParser()
    add_served_option(parser)
    both, alone = made(SERVED), made(("ranking_fused",))
    assert served_of(parser.parse_args([]), both) == served_of(parser.parse_args(["--served", "both"]), both) == SERVED
    assert served_of(parser.parse_args([]), alone) == ("ranking_fused",)
    for asked in ("ranking", "both"):
        with pytest.raises(ConfigError, match="serves ranking_fused, not ranking: ask for what it serves"):
            served_of(parser.parse_args(["--served", asked]), alone)


@pytest.fixture
def answering(monkeypatch):
    """``answering(scores, tables)``: what the server of the first answers says."""

    def answer(scores, tables):
        class Client:
            def __init__(self, url, name, tls):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def ask(self, request):
                return Answer(np.asarray(scores, np.float32), tables, {})

        monkeypatch.setattr(starting, "RankingClient", Client)
        monkeypatch.setattr(starting, "_CANARY_PAUSE_S", 0)

    return answer


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("served", [("ranking",), ("ranking_fused",)], ids=",".join)
def test_one_model_is_held_against_onnx_runtime(made, served, flavour, answering):
    deployment = made(served, flavour)
    known = json.loads((deployment.path / FILE).read_text())
    right, label = np.asarray(known["scores"]), f"ckptA@{known['tables'][:12]}"
    answering(right, label)
    difference = starting._first_answer(deployment, "")
    assert difference == pytest.approx(0, abs=1e-6)
    ready = starting.Ready(version="2.51.0", seconds=1.0, canary_difference=difference)
    assert f"{served[0]} agrees with ONNX Runtime within" in banner._check_text(deployment, ready)
    allowed = allowed_difference(deployment.model)
    for wrong in (right + 2 * allowed, right * np.nan, right[:-1]):
        answering(wrong, label)
        with pytest.raises(GateError, match=f"{served[0]} and ONNX Runtime disagree by"):
            starting._first_answer(deployment, "")
    answering(right + 1, "v2@0123456789ab")
    assert starting._first_answer(deployment, "") is None, "of tables that nobody knows"
    unknown = starting.Ready(version="2.51.0", seconds=1.0, canary_difference=None)
    assert "compared with none" in banner._check_text(deployment, unknown)


def test_a_damaged_reference_is_found_before_the_launch(made, tmp_path):
    shutil.copytree(made(("ranking_fused",)).path, tmp_path / "copy", symlinks=True)
    path = tmp_path / "copy" / FILE
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(ArtefactError, match=rf"{FILE} does not match the sha256"):
        read_deployment(tmp_path / "copy")
    path.write_text("[]")
    deployment = SimpleNamespace(path=tmp_path / "copy", flavour="cpu", versions=tmp_path / "none")
    with pytest.raises(ArtefactError, match="is no answer to a canary"):
        reference_of(deployment, "")


def test_rows_that_only_a_cluster_holds_have_no_reference(exported, tmp_path):
    model = read_model_folder(exported("fp32"))
    remote = {"tier": "remote", "nodes": ["127.0.0.1:1"], "local_copy": False}
    table = min(path.name for path in model.tables.iterdir() if path.is_dir())
    (tmp_path / "tiers.json").write_text(json.dumps({"tables": {table: remote}}))
    options = Options(served=("ranking_fused",), tiers=tmp_path / "tiers.json")
    deployment = assemble(model, tmp_path / "out", options)
    assert not (deployment.path / FILE).exists()
    assert reference_of(deployment, "") is None


def test_a_model_without_graphs_cannot_be_served_alone(make_model, tmp_path):
    with pytest.raises(ArtefactError, match=r"hstu\.onnx is missing"):
        assemble(make_model(), tmp_path / "out", Options(served=("ranking_fused",)))
    assert not (tmp_path / "out").exists()
