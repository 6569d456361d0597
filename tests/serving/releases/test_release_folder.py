"""A version finds the dense weights that it belongs to, or is refused."""

import dataclasses
import json
import os
import shutil

import pytest
from release_folders import ROWS, move_behind_link, publish, write_model, write_tables
from small_models import LIMITS, small_config

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.table_versions import tables_in
from hstu_trt.serving import pbtxt
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.refresh.releases import check_published
from hstu_trt.serving.refresh.settings import RefreshSettings


def test_a_version_finds_its_dense_model(folder):
    assert folder.current() is None
    for name in ("v1", "d2"):
        assert folder.dense_of(folder.path / name) is folder.model
    for name in ("b3", "v4"):
        assert folder.dense_of(folder.path / name).digest == read_model_folder(folder.path / "b3").digest
    assert folder.dense_by_digest(folder.model.digest) is folder.model
    with pytest.raises(ArtefactError, match="no model folder of digest ffff"):
        folder.dense_by_digest("f" * 64)


def test_what_cannot_be_served_is_found_before_the_launch(folder):
    assert check_published(folder) is None
    for name in ("v1", "d2", "b3", "v4"):
        publish(folder, name)
        assert check_published(folder).name == name
    shutil.rmtree(folder.path / "b3")
    with pytest.raises(ArtefactError, match="0 model folders"):
        check_published(folder)
    publish(folder, "d2")
    shutil.rmtree(folder.path / "v1")
    with pytest.raises(ArtefactError, match="no whole version"):
        check_published(folder)


UNFIT = {
    "no dense model": (
        lambda root: write_tables(root / "x", 1, "C"),
        "belongs to the dense weights C.*0 model folders",
    ),
    "no pair_id": (lambda root: write_tables(root / "x", 1, None), "does not say which dense weights.*--pair-with"),
    "two dense models": (
        lambda root: [
            write_model(root / "x", 1, "C"),
            write_model(root / "y", 2, "C", weights="other"),
            write_tables(root / "z", 1, "C"),
        ],
        "2 model folders",
    ),
    "other limits": (
        lambda root: write_model(root / "x", 1, "C", limits=dataclasses.replace(LIMITS, users=3)),
        "other limits than the model of this deployment",
    ),
    "other precision": (lambda root: write_model(root / "x", 1, "C", precision="fp16"), "other precision"),
    "other config": (
        lambda root: write_model(root / "x", 1, "C", config=small_config(contextual=False)),
        "other (stages|config)",
    ),
}


@pytest.mark.parametrize(("write", "says"), UNFIT.values(), ids=UNFIT)
def test_versions_without_a_fitting_dense_model_are_refused(folder, write, says):
    write(folder.path)
    version = folder.path / ("z" if (folder.path / "z").exists() else "x")
    with pytest.raises(ArtefactError, match=says):
        folder.dense_of(version)


def test_dense_weights_that_were_exported_again_are_the_same(folder):
    """Newer tables in a second folder, with more rows, of one checkpoint; its weights are in use either way."""
    write_model(folder.path / "b5", 6, "B", rows=ROWS + 2)
    chosen = folder.dense_of(folder.path / "v4")
    assert chosen.digest in {read_model_folder(folder.path / name).digest for name in ("b3", "b5")}
    assert folder.dense_of(folder.path / "v4").digest == chosen.digest
    write_model(folder.path / "b9", 6, "B", weights="other")
    with pytest.raises(ArtefactError, match="2 model folders"):
        folder.dense_of(folder.path / "v4")
    (folder.path / "b9/more.bin").write_bytes(b"x")
    assert folder.dense_of(folder.path / "v4").digest == chosen.digest, "what may not be published is passed over"


def edit(manifest, change):
    document = json.loads(manifest.read_text())
    change(document)
    manifest.write_text(json.dumps(document))


UNBOUND = {
    "a graph is not listed": (
        lambda b3, away: edit(b3 / "manifest.json", lambda d: d["files"].pop("hstu.onnx")),
        "hstu.onnx is not among the files of its manifest",
    ),
    "the weights are not listed": (
        lambda b3, away: edit(b3 / "manifest.json", lambda d: d["files"].pop("weights.safetensors")),
        "weights.safetensors is not among",
    ),
    "the tables are not listed": (
        lambda b3, away: edit(b3 / "manifest.json", lambda d: d["files"].pop("tables/manifest.json")),
        "tables/manifest.json is not among",
    ),
    "what a graph may name is not listed": (
        lambda b3, away: (b3 / "more.bin").write_bytes(b"x"),
        "more.bin is not among",
    ),
    "a folder behind a link": (lambda b3, away: (b3 / "more").symlink_to("/tmp"), "more is not among"),
    "weights behind a link": (
        lambda b3, away: move_behind_link(b3 / "weights.safetensors", away),
        "weights.safetensors is behind a link",
    ),
    "tables behind a link": (lambda b3, away: move_behind_link(b3 / "tables", away), "behind a link"),
}


@pytest.mark.parametrize(("change", "says"), UNBOUND.values(), ids=UNBOUND)
def test_a_model_whose_digest_does_not_tell_all_is_refused(folder, tmp_path, change, says):
    change(folder.path / "b3", tmp_path / "away")
    with pytest.raises(ArtefactError, match=says):
        folder.dense_of(folder.path / "b3")
    with pytest.raises(ArtefactError, match=says):
        publish(folder, "b3")


def test_models_and_tables_behind_links_are_no_versions(folder, tmp_path):
    move_behind_link(folder.path / "b3", tmp_path / "away")
    with pytest.raises(ArtefactError, match="0 model folders"):
        folder.dense_of(folder.path / "v4")
    move_behind_link(tmp_path / "away/tables", tmp_path / "tables")
    with pytest.raises(ArtefactError, match="a version holds its tables itself"):
        tables_in(tmp_path / "away")


def test_tables_of_a_new_dense_model_may_have_grown(folder):
    write_model(folder.path / "x", 1, "C", rows=ROWS + 5)
    assert folder.dense_of(folder.path / "x").pair_id == "C"


def test_assemble_links_the_folder_of_versions(folder, tmp_path):
    settings = RefreshSettings(
        tables=folder.path, mode="overlay", memory_bytes=10**9, poll_s=0.5, bad_version="previous"
    )
    deployment = assemble(folder.model, tmp_path / "out", Options(refresh=settings))
    assert deployment.versions.resolve() == folder.path
    configs = pbtxt.read_repository(deployment.repository)
    for name in ("embedding_lookup", "ranking_fused"):
        found = [pbtxt.parameter(configs[name], key) for key in ("refresh", "refresh_memory_bytes")]
        assert found == ["overlay", "1000000000"]
    for name in ("embedding_lookup", "hstu", "mlp_head", "ranking_fused"):
        assert pbtxt.parameter(configs[name], "refresh_poll_seconds") == "0.5"
        assert pbtxt.parameter(configs[name], "bad_version") == "previous"
        linked = deployment.repository / name / pbtxt.parameter(configs[name], "versions_folder")
        assert os.path.realpath(linked) == str(folder.path)
    assert deployment.bad_version == "previous"
    plain = assemble(folder.model, tmp_path / "plain", Options())
    assert (plain.versions.exists(), plain.bad_version) == (False, "refuse")
    shutil.rmtree(folder.path)
    with pytest.raises(ConfigError, match="is no folder; it holds the versions"):
        RefreshSettings(tables=folder.path)


@pytest.mark.parametrize(
    "wrong",
    [{"mode": "maybe"}, {"poll_s": 0.0}, {"poll_s": float("nan")}, {"memory_bytes": -1}, {"bad_version": "any"}],
    ids=str,
)
def test_settings_of_refreshes_are_checked(wrong):
    with pytest.raises(ConfigError):
        RefreshSettings(**wrong)
