"""Files that are damaged, cut short or swapped are found by their digests before they are served.

At the start, at a restart by the supervisor, and when they are published to a running server (for that, see also
tests/serving/test_refresh_served.py). A message names the file and the command that makes it again.
"""

import dataclasses
import json
import os
import shutil
import signal
from contextlib import suppress

import numpy as np
import pytest
from served import request_of
from supervised import Supervised, process_of
from waiting import eventually

from hstu_trt.contract.errors import ArtefactError, HstuTrtError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.serving.answers import ServerError
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.deployment import read_deployment
from hstu_trt.serving.engine_steps import read_engines
from hstu_trt.serving.starting import check
from hstu_trt.serving.supervision import mapped_files

pytestmark = [pytest.mark.faults]


@pytest.fixture(scope="module")
def copied(deployment, tmp_path_factory):
    """A deployment over a model folder of its own."""
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(deployment.model.path, folder / "model")
    return assemble(read_model_folder(folder / "model"), folder / "deployment", Options())


def write_over(path, content):
    """In place: a process that has mapped the file must not find it cut short meanwhile."""
    with path.open("r+b" if path.exists() else "wb") as stream:
        stream.write(content)
        stream.truncate()


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    write_over(path, content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def remove(path):
    path.unlink()


def swap(path):
    """For another file of the same length, whose words are those of a good one."""
    path.write_bytes(path.read_bytes()[::-1])


DAMAGES = {"flipped": flip, "cut": cut, "removed": remove, "swapped": swap}
# file -> what the remedy begins with
FILES = {
    "model/hstu.onnx": "hstu-trt export",
    "model/ranking_fused.onnx": "hstu-trt export",
    "model/weights.safetensors": "hstu-trt export",
    "model/tables/manifest.json": "hstu-trt export",
    "model/manifest.json": "hstu-trt export",
    "models/hstu/config.pbtxt": "hstu-trt assemble",
    "models/hstu/1/model.py": "hstu-trt assemble",
    "models/ranking/config.pbtxt": "hstu-trt assemble",
    "manifest.json": "hstu-trt assemble",
}


class Damaged:
    """A damaged file, whole again after the block."""

    def __init__(self, path, damage):
        self._path, self._damage, self._content = path.resolve(), damage, path.read_bytes()

    def __enter__(self):
        self._damage(self._path)

    def __exit__(self, *error):
        write_over(self._path, self._content)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(("file", "remedy"), FILES.items(), ids=FILES)
def test_a_damaged_file_is_named_before_the_launch(copied, file, remedy, damage):
    path = copied.path / file
    with Damaged(path, damage), pytest.raises(HstuTrtError) as caught:
        check(read_deployment(copied.path))
    folder = path.resolve().parent if path.name == "manifest.json" else path.resolve()
    assert str(folder) in str(caught.value) or file in str(caught.value)
    assert remedy in str(caught.value)
    check(read_deployment(copied.path))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_named_by_check(copied, damage):
    """``serve`` itself looks at sizes before the launch; each process that serves rows hashes them as it starts."""
    shard = next(copied.model.tables.glob("*/00000.safetensors"))
    with Damaged(shard, damage), pytest.raises(ArtefactError, match=f"{shard.parent.name}/00000.safetensors"):
        check(copied, hash_tables=True)


PLANS = ["hstu.plan", "mlp_head.plan", "ranking_fused.plan", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", PLANS)
def test_a_damaged_engine_is_named(deployment, tmp_path, file, damage):
    """GPU and TensorRT version: tests/engines/test_engine_folder.py, marked ``faults`` too."""
    engines = written_engines(tmp_path / "engines", deployment.model)
    read_engines(engines, deployment.model)
    with Damaged(engines / file, damage), pytest.raises(ArtefactError, match="hstu-trt engines") as caught:
        read_engines(engines, deployment.model)
    assert str(engines / (file if file != "manifest.json" else "")).rstrip("/") in str(caught.value)


def test_engines_of_another_export_are_refused(deployment, tmp_path):
    engines = written_engines(tmp_path / "engines", dataclasses.replace(deployment.model, digest="0" * 64))
    with pytest.raises(ArtefactError, match=r"was built from another export than .*hstu-trt engines"):
        read_engines(engines, deployment.model)


def written_engines(folder, model):
    from hstu_trt.contract.manifest import write_manifest

    folder.mkdir()
    stages = ("hstu", "mlp_head", "ranking_fused")
    for number, stage in enumerate(stages):
        (folder / f"{stage}.plan").write_bytes(np.random.default_rng(number).bytes(1000))
    entries = [{"stage": stage, "file": f"{stage}.plan", "details": {"profiles": ["one"]}} for stage in stages]
    facts = {"builder": "tensorrt", "model": {"digest": model.digest}, "stages": entries}
    write_manifest(folder, kind="engines", made_by="a test", files=[e["file"] for e in entries], facts=facts)
    return folder


@pytest.mark.triton
def test_a_restart_refuses_what_was_damaged_meanwhile_and_takes_it_whole_again(copied):
    """The running server does not read its files again; the next one does, and clients get nothing from it."""
    request = request_of(copied, 8, 5)
    shard = next((copied.model.tables / "item_id").glob("00000.safetensors"))
    serve = Supervised(copied)
    with RankingClient(serve.url) as client:
        before = client.ask(request)
        for number, path in enumerate((copied.model.path / "hstu.onnx", shard), start=1):
            refused = serve.count("restart_failed")
            with Damaged(path, flip):
                if path != shard:
                    assert np.array_equal(client.ask(request).scores, before.scores)
                # Of a shard the watch may know by now, and end the server itself.
                with suppress(ValueError, ProcessLookupError):
                    os.kill(process_of(serve.server, "mlp_head"), signal.SIGKILL)
                cause = serve.wait_for("restart_failed", refused + 1)["cause"]
                assert path.name in cause and "sha256" in cause
                assert "hstu-trt" in cause, "a remedy is named"
            serve.wait_for("restarted", number)
            answer = answer_again(client, request)
            assert np.array_equal(answer.scores, before.scores)
            assert answer.tables_version == before.tables_version
    assert serve.stop() == 0
    events = json.loads(next(copied.run.glob("restarts-*.json")).read_text())["events"]
    assert [event["event"] for event in events].count("restarted") == 2


@pytest.mark.triton
def test_a_shard_that_is_overwritten_while_it_is_served_ends_the_server(copied):
    """Its rows are mapped: what is written into the file is what is answered, for as long as nobody looks."""
    request = request_of(copied, 8, 5)
    shard = next((copied.model.tables / "item_id").glob("00000.safetensors"))
    serve = Supervised(copied)
    with RankingClient(serve.url) as client:
        before = client.ask(request).scores
        with Damaged(shard, flip):
            touch_until(serve, shard, faults=1)
            assert serve.wait_for("fault")["cause"] == f"{shard} was overwritten while its rows were served"
            cause = serve.wait_for("restart_failed")["cause"]
            assert shard.name in cause and "sha256" in cause and "hstu-trt" in cause
            with pytest.raises(HstuTrtError, match="UNAVAILABLE"):
                client.ask(request)
        serve.wait_for("restarted")
        assert np.array_equal(answer_again(client, request).scores, before)
        touch_until(serve, shard, faults=2)  # the same rows, which nobody knows before they are hashed
        serve.wait_for("restarted", 2)
        assert np.array_equal(answer_again(client, request).scores, before)
    assert serve.stop() == 0


def answer_again(client, request):
    """gRPC takes half a second to look for a server again that it did not find."""

    def answer():
        with suppress(ServerError):
            return [client.ask(request)]

    (found,) = eventually(answer, "the next server does not answer")
    return found


def touch_until(serve, path, faults):
    """Until there are so many: what changed before the watch first saw the file is no change to it."""

    def is_noticed():
        os.utime(path)
        return serve.count("fault") >= faults

    eventually(is_noticed, lambda: serve.events)


@pytest.fixture
def looks(monkeypatch):
    monkeypatch.setattr(mapped_files, "EVERY_S", 0.0)
    monkeypatch.setattr(mapped_files, "_REST", 0)


CHANGES = {
    "written into": (lambda path, other: write_over(path, b"x" * 9000), True),
    "one byte": (flip, True),
    "grown": (lambda path, other: path.open("ab").write(b"x"), True),
    "renamed over": (lambda path, other: other.replace(path), False),
    "deleted": (lambda path, other: path.unlink(), False),
    "read": (lambda path, other: path.read_bytes(), False),
    "another file": (lambda path, other: write_over(other, b"y"), False),
}


@pytest.mark.parametrize(("change", "is_noticed"), CHANGES.values(), ids=CHANGES)
def test_which_changes_of_a_mapped_file_count(tmp_path, looks, change, is_noticed):
    path, other, plain = (tmp_path / name for name in ("a b.safetensors", "other.safetensors", "rows.bin"))
    for each in (path, other, plain):
        each.write_bytes(bytes(9000))
        os.utime(each, ns=(0, 0))  # long ago: times of files grow by milliseconds, and the change comes sooner
    mapped = [np.memmap(each, np.uint8, "r") for each in (path, plain)]
    files = mapped_files.MappedFiles([os.getpid()])
    assert files.look() is None
    for each in (other, plain):
        os.utime(each, ns=(1, 1))
    assert files.look() is None and mapped
    change(path, *([other] if change is not flip else []))
    assert files.look() == (str(path) if is_noticed else None)


def test_processes_that_are_gone_map_nothing(looks):
    assert mapped_files.MappedFiles([2**22 + 1]).look() is None
