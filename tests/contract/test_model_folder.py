"""The model folder: what export writes is what readers see, and another contract is refused."""

import dataclasses
import json

import pytest

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.model import ResearchHstuConfig
from hstu_trt.contract.model_folder import contract_digest, onnx_stages, read_model_folder, write_model_folder
from hstu_trt.contract.presets import debug
from hstu_trt.contract.tensors import default_limits, stage_specs

RESEARCH = ResearchHstuConfig(layers=1, heads=1, qk_dim=4, v_dim=4, model_dim=8, max_seq_len=16)


def write(folder, config=None):
    (folder / "tables").mkdir()
    (folder / "tables/manifest.json").write_text("{}")
    (folder / "hstu.onnx").write_bytes(b"onnx")
    write_model_folder(
        folder,
        name="planted",
        config=config or debug(),
        limits=default_limits(debug()),
        precision="fp16",
        made_by="hstu-trt export",
        facts={"versions": {}},
    )
    return read_model_folder(folder)


@pytest.mark.parametrize("config", [debug(), RESEARCH])
def test_a_model_folder_is_read_back(tmp_path, config):
    written = write(tmp_path, config)
    assert read_model_folder(tmp_path) == written
    assert (written.name, written.config, written.precision) == ("planted", config, "fp16")
    assert set(onnx_stages(config)) <= set(written.specs)
    assert written.onnx("hstu") == tmp_path / "hstu.onnx"


def edit(folder, change):
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


REFUSED = {
    "another contract": (lambda d: d.update(contract="0" * 64), "was exported under another contract"),
    "other limits": (lambda d: d["limits"].update(users=5), "was exported under another contract"),
    "an unknown limit": (lambda d: d["limits"].update(zzz=5), "its manifest is malformed"),
    "no precision": (lambda d: d.pop("precision"), "its manifest is malformed"),
    "an unknown precision": (
        lambda d: d.update(precision="fp64"),
        "its manifest is malformed .unknown precision 'fp64'",
    ),
    "a name that is none": (lambda d: d.update(name=3), "its manifest is malformed .name must be a text, got 3"),
    "a pair id that is none": (lambda d: d.update(pair_id=[1]), r"its manifest is malformed .pair_id must be a text"),
    "sites that are none": (lambda d: d.update(fp8_sites=["head", 3]), "fp8_sites must be a list of names"),
    "half a limit": (lambda d: d["limits"].update(users=1.5), "limit users must be a whole number, got 1.5"),
    "another schema": (lambda d: d.update(schema=2), "describes 'onnx' of schema 2, not 'onnx' of schema 1"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_model_folder_is_refused_with_its_remedy(tmp_path, change, message):
    write(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ArtefactError, match=f"{message}.*hstu-trt export --config"):
        read_model_folder(tmp_path)


def test_the_digest_follows_the_files(tmp_path):
    before = write(tmp_path).digest
    (tmp_path / "tables/manifest.json").unlink()
    (tmp_path / "tables").rmdir()
    (tmp_path / "weights.safetensors").write_bytes(b"other")
    assert write(tmp_path).digest != before


def test_a_research_folder_is_no_ranking_model(tmp_path):
    with pytest.raises(ArtefactError, match="holds a sequence encoder; this needs a ranking model"):
        _ = write(tmp_path, RESEARCH).ranking_config


def test_the_contract_digest_sees_a_changed_seam():
    wider = dataclasses.replace(debug(), model_dim=128)
    digests = {
        contract_digest(stage_specs(config, default_limits(config), precision))
        for config in (debug(), wider)
        for precision in ("fp32", "fp16")
    }
    assert len(digests) == 4
