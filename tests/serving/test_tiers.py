"""Tiers of a deployment without servers: settings are kept, shown, and refused where the machine cannot follow."""

import json

import pytest

from hstu_trt.contract.errors import ArtefactError, ConfigError, GateError
from hstu_trt.serving import lint, pbtxt, tier_report
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.deployment import read_deployment
from hstu_trt.serving.serve import main
from hstu_trt.serving.starting import check

REMOTE = {"tier": "remote", "nodes": ["127.0.0.1:1"], "password_file": "secret"}


@pytest.fixture
def make_deployment(make_model, tmp_path):
    def make(**tables):
        model = make_model()
        settings = tmp_path / "settings" / "mine.json"
        settings.parent.mkdir(exist_ok=True)
        settings.write_text(json.dumps({"tables": tables}))
        return assemble(model, tmp_path / "deployment", Options(tiers=settings))

    return make


def parameter(deployment, model):
    return pbtxt.parameter(pbtxt.read_config(deployment.repository / model / pbtxt.CONFIG_FILE), "tiers")


def test_settings_go_into_the_deployment(make_deployment, tmp_path):
    deployment = make_deployment(item_id={"tier": "resident"}, user_id=REMOTE)
    assert deployment.tiers.of("item_id").tier == "resident"
    # Relative paths begin where the settings were, and mean the same elsewhere.
    assert deployment.tiers.of("user_id").remote.password_file == str(tmp_path / "settings" / "secret")
    assert [parameter(deployment, name) for name in ("embedding_lookup", "ranking_fused")] == ["../../tables.json"] * 2
    assert parameter(deployment, "hstu") is None
    check(deployment, connect=False)


def test_settings_are_part_of_what_is_verified(make_deployment):
    deployment = make_deployment(item_id={"tier": "resident"})
    path = deployment.path / "tables.json"
    path.write_text(path.read_text().replace("resident", "mapped  "))
    with pytest.raises(ArtefactError, match=r"tables\.json does not match the sha256"):
        read_deployment(deployment.path)


def test_without_settings_nothing_is_there(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "deployment", Options())
    assert not (deployment.path / "tables.json").exists()
    assert parameter(deployment, "embedding_lookup") is None
    assert {placed.tier for placed in tier_report.placed_tables(deployment)} == {"mapped"}


def test_settings_without_their_parameter_are_found(make_deployment):
    deployment = make_deployment(item_id={"tier": "resident"})
    path = deployment.repository / "embedding_lookup" / pbtxt.CONFIG_FILE
    config = pbtxt.read_config(path)
    del config.parameters["tiers"]
    path.write_text(pbtxt.config_text(config))
    with pytest.raises(GateError, match="R16-tiers: embedding_lookup"):
        lint.require_clean(deployment.repository, deployment.model)


def test_settings_of_unknown_tables_are_refused(make_deployment):
    with pytest.raises(ConfigError, match="no table 'items'"):
        make_deployment(items={"tier": "resident"})


def test_more_memory_than_there_is_is_refused(make_deployment, monkeypatch):
    deployment = make_deployment(item_id={"tier": "resident"})
    monkeypatch.setattr(tier_report, "available_memory", lambda: 100)
    with pytest.raises(ConfigError, match=r"resident tables take 144 B in 2 processes, 100 B .*make 'item_id'"):
        check(deployment, connect=False)


def test_dry_run_shows_tables_and_memory(make_deployment, capsys):
    deployment = make_deployment(item_id={"tier": "resident"}, user_id={**REMOTE, "local_copy": False})
    arguments = ["--deployment", str(deployment.path), "--dry-run", "--grpc-port", "0"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line.split()[1]: line for line in lines if line.startswith("# ") and "float16" in line}
    assert "resident  144 B" in told["item_id"]
    assert "huge pages, once in each of 2 processes" in told["item_id"]
    assert "127.0.0.1:1; 15 ms per request, then fails the request" in told["user_id"]
    assert any(line.startswith("# memory for rows: 144 B of ") for line in lines)
    assert "tritonserver" in lines[-1] + "".join(lines)
    assert main([*arguments, "--json"]) == 0
    tables = {table["table"]: table for table in json.loads(capsys.readouterr().out)["tables"]}
    assert (tables["item_id"]["memory"], tables["user_id"]["tier"], tables["user_id"]["memory"]) == (144, "remote", 0)


def test_rows_that_are_elsewhere_need_no_files(make_deployment, make_model, tmp_path):
    deployment = make_deployment(user_id={**REMOTE, "local_copy": False})
    for shard in (deployment.model.tables / "user_id").iterdir():
        shard.unlink()
    check(deployment, hash_tables=True, connect=False)


def test_rows_that_should_be_here_are_missed(make_deployment):
    deployment = make_deployment(user_id=REMOTE)
    for shard in (deployment.model.tables / "user_id").iterdir():
        shard.unlink()
    with pytest.raises(ArtefactError, match=r"user_id/00000\.safetensors is missing"):
        check(deployment, connect=False)
