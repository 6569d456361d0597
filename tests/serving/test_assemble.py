"""Assembling a deployment: what changes with the model, and what is refused."""

import dataclasses
import json
import shlex

import pytest

from hstu_trt.contract.config_json import config_from_json
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.presets import debug
from hstu_trt.serving import assemble_command as room
from hstu_trt.serving import pbtxt
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.cuda_steps import CudaSettings
from hstu_trt.serving.deployment import read_deployment
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.signature import MODELS, signatures

PLAIN = dataclasses.replace(
    debug(),
    contextual_features=(),
    action_weights=None,
    embedding_dim=4,
    tables=tuple(dataclasses.replace(table, rows=9, dim=4) for table in debug().tables),
)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("config", [None, PLAIN], ids=["contextual and actions", "neither"])
def test_configs_fit_the_model(make_model, tmp_path, config, precision):
    model = make_model(config, precision)
    deployment = assemble(model, tmp_path / "out", Options())
    configs = pbtxt.read_repository(deployment.repository)
    wanted = signatures(model.ranking_config, model.limits, precision)
    assert {name: pbtxt.signature_of(configs[name]) for name in MODELS} == wanted


def test_absent_inputs_leave_no_trace(make_model, tmp_path):
    deployment = assemble(make_model(PLAIN), tmp_path / "out", Options())
    for name in MODELS:
        text = (deployment.repository / name / "config.pbtxt").read_text()
        lines = [line for line in text.splitlines() if '"config"' not in line and "string_value" not in line]
        assert not any("contextual" in line or "uih_actions" in line for line in lines), name


def test_parameters_reach_the_models(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "out", Options(attention_norm="fixed:77", id_policy="clamp"))
    configs = pbtxt.read_repository(deployment.repository)
    for name, key, value in (
        ("hstu", "attention_norm", "fixed:77"),
        ("ranking_fused", "attention_norm", "fixed:77"),
        ("ranking_fused", "id_policy", "clamp"),
        ("embedding_lookup", "id_policy", "clamp"),
    ):
        assert pbtxt.parameter(configs[name], key) == value
    assert pbtxt.parameter(configs["mlp_head"], "attention_norm") is None
    config = config_from_json(json.loads(pbtxt.parameter(configs["ranking"], "config")))
    assert config == deployment.model.config


MADE = {
    "as usual": lambda folder: Options(),
    "all that cpu takes": lambda folder: Options(
        attention_norm="fixed:77", id_policy="row0", queue=3, tiers=folder / "tiers.json",
        refresh=RefreshSettings(
            tables=folder, mode="overlay", memory_bytes=123_456_789, poll_s=0.25, bad_version="previous"
        ),
    ),
    "cuda": lambda folder: Options(flavour="cuda", cuda=CudaSettings(device="cpu", batch_tokens=99)),
}  # fmt: skip


@pytest.mark.parametrize("options", MADE.values(), ids=MADE)
def test_the_command_in_the_manifest_makes_the_same_again(make_model, tmp_path, options):
    """Whoever is told to make a deployment again gets the settings that it had; paths are quoted for the shell."""
    folder = tmp_path / "versions, of tables"
    folder.mkdir()
    (folder / "tiers.json").write_text(json.dumps({"default": {"tier": "resident"}}))
    deployment = assemble(make_model(), tmp_path / "the first", options(folder))
    verb, *words = shlex.split(json.loads((deployment.path / "manifest.json").read_text())["made_by"])[1:]
    assert (verb, words[-2:]) == ("assemble", ["--out", str(tmp_path / "the first")])
    assert room.main([*words[:-1], str(tmp_path / "again")]) == 0
    again = read_deployment(tmp_path / "again")
    assert pbtxt.read_repository(again.repository) == pbtxt.read_repository(deployment.repository)
    assert dataclasses.replace(again, path=deployment.path) == deployment


def test_attention_norm_defaults_to_max_seq_len(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "out", Options())
    assert deployment.attention_norm == f"fixed:{debug().max_seq_len}"


@pytest.mark.parametrize("text", ["batch_max", "fixed", "fixed:", "fixed:0", "fixed:-3", "fixed:nan", "fixed:inf", "7"])
def test_attention_norm_must_be_fixed(text):
    with pytest.raises(ConfigError, match="expected fixed:<N>"):
        Options(attention_norm=text)


def test_dry_run_prints_the_difference_and_writes_nothing(make_model, tmp_path, capsys):
    model = make_model()
    assert room.main(["--model", str(model.path), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "--- triton_repo/hstu/config.pbtxt" in shown
    assert "-  dims: 1024\n" in shown
    assert "+  dims: 8\n" in shown
    assert not (tmp_path / "out").exists()


def test_json_names_the_deployment(make_model, tmp_path, capsys):
    model = make_model()
    assert room.main(["--model", str(model.path), "--out", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deployment"] == str(tmp_path / "out")


def test_deployment_is_replaced_but_other_folders_are_kept(make_model, tmp_path):
    model = make_model()
    assemble(model, tmp_path / "out", Options())
    assert assemble(model, tmp_path / "out", Options(id_policy="zero")).id_policy == "zero"
    (tmp_path / "mine" / "models").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not a deployment"):
        assemble(model, tmp_path / "mine", Options())
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_nothing_stray_is_copied(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "out", Options())
    assert {path.name for path in deployment.repository.iterdir()} == set(MODELS)
    assert not list(deployment.repository.rglob("__pycache__"))


def test_edited_config_is_refused(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "out", Options())
    path = deployment.repository / "hstu" / "config.pbtxt"
    path.write_text(path.read_text().replace("dims: 8", "dims: 9"))
    with pytest.raises(ArtefactError, match=r"config.pbtxt does not match the sha256.*hstu-trt assemble"):
        read_deployment(deployment.path)


def test_new_export_makes_the_deployment_stale(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "out", Options())
    make_model(dataclasses.replace(deployment.model.config, max_seq_len=99))
    with pytest.raises(ArtefactError, match=r"another export of .*hstu-trt assemble"):
        read_deployment(deployment.path)


def test_moved_model_is_named(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "out", Options())
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match=f"leads nowhere: its model folder {tmp_path / 'model'} was moved"):
        read_deployment(deployment.path)
