"""The hand-written repository says what the contract says."""

import pytest

from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.presets import dlrm_v3
from hstu_trt.contract.tensors import default_limits
from hstu_trt.serving import pbtxt
from hstu_trt.serving.assemble import REPOSITORY
from hstu_trt.serving.signature import ATTENTION_NORM, MODELS, signatures

CONFIGS = pbtxt.read_repository(REPOSITORY)
WANTED = signatures(dlrm_v3(), default_limits(dlrm_v3()), "fp32")


def test_repository_holds_the_models_and_nothing_else():
    assert set(CONFIGS) == set(MODELS) == {path.name for path in REPOSITORY.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", MODELS)
def test_config_is_the_contract_of_dlrm_v3(name):
    assert pbtxt.signature_of(CONFIGS[name]) == WANTED[name]


@pytest.mark.parametrize("name", MODELS)
def test_version_folder_survives_git(name):
    assert any(path.is_file() for path in (REPOSITORY / name / "1").iterdir())


def test_attention_norm_is_the_preset_s_longest_sequence():
    for name in ("hstu", "ranking_fused"):
        assert parse_fixed_norm(pbtxt.parameter(CONFIGS[name], ATTENTION_NORM)) == dlrm_v3().max_seq_len


def test_broken_config_names_file_and_line(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text('name: "m"\nbackend python')
    with pytest.raises(pbtxt.ArtefactError, match=r"config.pbtxt:2:\d+"):
        pbtxt.read_repository(tmp_path)
