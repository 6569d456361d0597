"""Releases of a fleet under load: no request fails, none is answered by two versions, and a bad one changes nothing."""

import re
import shutil

import pytest
from broken_deployments import OFF_BY_A_LITTLE, replace_file
from fleets import Load, answers_in_order

from hstu_trt.contract.cli import main

pytestmark = [pytest.mark.triton, pytest.mark.nginx, pytest.mark.faults]


@pytest.fixture(scope="module")
def load(fleet, deployment, other_deployment):
    return Load(fleet.url, {"old": deployment, "new": other_deployment})


@pytest.fixture(scope="module")
def golden_files(golden, other_deployment, tmp_path_factory):
    """Requests, and what the new deployment must answer: the scores of another runner."""
    folder = tmp_path_factory.mktemp("golden")
    requests, expected = golden / "caseA/inputs.safetensors", folder / "expected.safetensors"
    norm = other_deployment.attention_norm
    arguments = ["--model", other_deployment.model.path, "--inputs", requests, "--runner", "onnxruntime"]
    assert main(["score", *map(str, arguments), "--attention-norm", norm, "--out", str(expected)]) == 0
    return requests, expected


def test_release_and_rollback_under_load(fleet, load, other_deployment, golden_files):
    requests, expected = golden_files
    with load:
        load.wait_for_more()
        code, out, said = fleet.command(
            "release", "--deployment", other_deployment.path, "--golden", requests, "--expected", expected
        )
        assert code == 0, said
        assert "golden requests give the expected scores" in out
        load.wait_for_more()
    labels = answers_in_order(load)
    assert set(labels) == {"old", "new"} and (labels[0], labels[-1]) == ("old", "new"), labels
    with load:
        load.wait_for_more()
        code, _, said = fleet.command("release", "--rollback")
        assert code == 0, said
        load.wait_for_more()
    labels = answers_in_order(load)
    assert set(labels) == {"old", "new"} and (labels[0], labels[-1]) == ("new", "old"), labels
    status = fleet.status()
    assert status["previous"]["deployment"] == str(other_deployment.path)


def corrupted(copy):
    """One bit of a file."""
    weights = copy / "model/hstu.onnx"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)


def does_not_start(copy):
    """Files that match their digests, and a model that cannot be loaded."""
    replace_file(copy, "models/hstu/1/model.py", "raise RuntimeError('planted')\n")


def answers_wrongly(copy):
    """A step that is off by a little: both models answer, and disagree."""
    replace_file(copy, "models/mlp_head/1/model.py", OFF_BY_A_LITTLE)


def is_another_model(copy):
    """A deployment that is sound in itself; only golden requests tell that it is not the one that was meant."""


# what is wrong with a deployment -> what the release says
BROKEN = {
    corrupted: "the new deployment is not sound: .*hstu.onnx does not match the sha256 in its manifest",
    does_not_start: "r[0-9]+ did not start: .*planted",
    answers_wrongly: "ranking and ranking_fused disagree by 0.01",
    is_another_model: "scores golden request 0 .* away from what .*expected.safetensors expects",
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_release_changes_nothing(fleet, load, deployment, golden_files, tmp_path, broken):
    copy = tmp_path / "deployment"
    shutil.copytree(deployment.path, copy, symlinks=True, ignore=shutil.ignore_patterns("run", "__pycache__"))
    (copy / "model").unlink()
    shutil.copytree(deployment.model.path, copy / "model")
    broken(copy)
    fleet.all_serve(2)
    before = fleet.status()
    with load:
        load.wait_for_more()
        requests, expected = golden_files
        code, _, said = fleet.command("release", "--deployment", copy, "--golden", requests, "--expected", expected)
        load.wait_for_more()
    assert code == 1 and re.search(BROKEN[broken], said, re.DOTALL), said
    assert set(answers_in_order(load)) == {"old"}
    after = fleet.status()
    names = [(replica["name"], replica["restarts"]) for replica in after["current"]["replicas"]]
    assert names == [(replica["name"], replica["restarts"]) for replica in before["current"]["replicas"]]
    # On a busy machine one may be down for a moment, for being late.
    fleet.wait_for(lambda status: status["gets_requests"] == before["gets_requests"], "the replicas of before")


def test_the_folder_in_use_is_not_released_again(fleet, deployment):
    code, _, said = fleet.command("release", "--deployment", deployment.path)
    assert code == 1 and "is in use by generation" in said


def test_what_is_kept_for_a_rollback_can_be_retired(fleet, load, other_deployment):
    """It frees the memory; the way back then takes as long as a start."""
    assert fleet.status()["previous"]["replicas"]
    code, _, said = fleet.command("release", "--retire")
    assert code == 0, said
    assert not fleet.status()["previous"]["replicas"]
    code, _, said = fleet.command("release", "--retire")
    assert code == 1 and "no replicas are kept" in said
