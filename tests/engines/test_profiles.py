"""Optimisation profiles of every stage, from names and from bounds."""

import pytest

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.presets import debug, dlrm_v3
from hstu_trt.contract.tensors import ENSEMBLE, Limits, default_limits, stage_specs
from hstu_trt.engines.profiles import make_profiles

LIMITS = Limits(users=8, history=16, candidates=4, batch_history=64, batch_candidates=32)
STAGES = ["embedding_lookup", "hstu", "mlp_head", "ranking_fused"]


def profiles(stage, *texts, config=None, limits=LIMITS):
    return make_profiles(stage_specs(config or debug(), limits, "fp16")[stage], limits, texts)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("limits", [LIMITS, default_limits(dlrm_v3())])
def test_profiles_hold_the_contracts_dims(stage, limits):
    """Every axis of every input: users_plus_1 is users + 1, flat ids are tokens times features."""
    spec = stage_specs(dlrm_v3(), limits, "fp16")[stage]
    (batch,) = make_profiles(spec, limits, ["batch"])
    assert set(batch.shapes) == {tensor.name for tensor in spec.inputs}
    for tensor in spec.inputs:
        for axis, dim in enumerate(tensor.dims):
            bounds = tuple(shape[axis] for shape in batch.shapes[tensor.name])
            assert bounds == ((dim,) * 3 if isinstance(dim, int) else (dim.min, dim.opt, dim.max)), tensor.name


def test_single_is_one_user_of_any_length():
    (single,) = profiles("ranking_fused", "single")
    assert single.shapes["uih_offsets"] == ((2,), (2,), (2,))
    assert single.shapes["uih_ids"] == ((0,), (32,), (32,))
    assert single.shapes["uih_timestamps"] == ((0,), (16,), (16,))
    assert single.shapes["candidate_timestamps"] == ((1,), (4,), (4,))
    assert single.shapes["contextual_ids"] == ((1, 1), (1, 1), (1, 1))
    assert single.shapes["attention_norm"] == ((1,), (1,), (1,))


def test_own_bounds():
    (own,) = profiles("hstu", "small:users=1/2/3,uih_tokens=0/5/9")
    assert own.shapes["uih_offsets"] == ((2,), (3,), (4,))
    assert own.shapes["uih_embeddings"][2] == (9, 128)
    assert own.shapes["attention_norm"] == ((1,), (1,), (3,))
    assert own.shapes["candidate_timestamps"] == ((1,), (4,), (32,))
    (head,) = profiles("mlp_head", "small:users=1/2/3")
    assert set(head.dims) == {"candidates"}


def test_equal_profiles_are_one():
    alone = Limits(users=1, history=16, candidates=4, batch_history=16, batch_candidates=4)
    assert [p.name for p in profiles("mlp_head", "single", "batch", limits=alone)] == ["single"]
    assert [p.name for p in profiles("hstu", "single", "batch")] == ["single", "batch"]


@pytest.mark.parametrize(
    ("shape", "admitted"), [((9, 128), True), ((0, 128), True), ((10, 128), False), ((9, 64), False), ((9,), False)]
)
def test_admits(shape, admitted):
    (own,) = profiles("hstu", "small:uih_tokens=0/5/9")
    assert own.admits({"uih_embeddings": shape}) == admitted


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["fast"], "--profile fast: no such profile; choose single, batch, or give its bounds"),
        (["a:users=1/2"], "give a name, or NAME:dim=MIN/OPT/MAX"),
        (["a:users=2/1/3"], "users=2/1/3: needs min <= opt <= max, from 1 to 8"),
        (["a:users=0/1/3"], "from 1 to 8"),
        (["a:users=1/2/9"], "from 1 to 8"),
        (["a:norms=1/1/1"], "no dim 'norms'; choose from users, uih_tokens, candidates"),
        (["single", "single"], "two profiles have one name"),
        (["a:users=1/2/3", "a:users=1/2/4"], "two profiles have one name"),
    ],
)
def test_wrong_profiles_are_refused(texts, message):
    with pytest.raises(ConfigError, match=message):
        profiles("hstu", *texts)


def test_the_ensemble_has_profiles_too():
    assert profiles(ENSEMBLE, "single")
