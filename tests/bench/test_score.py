"""``hstu-trt score`` against the reference, and its ways around empty histories and missing candidates."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from hstu_trt.bench.chain import Chain, reference_token_order
from hstu_trt.bench.files import read_tensors, write_features, write_tensors
from hstu_trt.bench.score import pack_file, score, with_stand_ins
from hstu_trt.contract.cli import main
from hstu_trt.contract.config_json import load_config
from hstu_trt.contract.features import Jagged, jagged_features, pack_request
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder
from hstu_trt.contract.presets import debug
from hstu_trt.contract.runner import Runner

TOLERANCES = {"preds": 2e-5, "user_embeddings": 2e-5, "stu.0.out": 1e-4, "stu.1.out": 1e-4, "stu.2.out": 1e-4}
Features = Mapping[str, Jagged]


def users_of(features: Features, users: list[int], keep: Callable[[str, int], bool] = lambda *_: True) -> dict:
    """Some users of jagged features; a user's list is empty where ``keep(feature, user)`` is false."""
    picked = {}
    for name, feature in features.items():
        lists = np.split(feature.values, np.cumsum(feature.lengths)[:-1])
        picked[name] = Jagged.of_lists(name, [lists[user].tolist() if keep(name, user) else [] for user in users])
    return picked


@pytest.mark.parametrize("runner", ["torch", "onnxruntime"])
def test_golden_case(exported: Callable[[str], Path], golden: Path, tmp_path: Path, runner: str) -> None:
    inputs, out = golden / "caseA" / "inputs.safetensors", tmp_path / "out.safetensors"
    arguments = ["--model", exported("fp32"), "--inputs", inputs, "--runner", runner, "--out", out]
    assert main(["score", *map(str, arguments), "--attention-norm", "batch_max", "--taps"]) == 0
    expected, found = read_tensors(golden / "caseA" / "outputs.safetensors"), read_tensors(out)
    assert set(found) == set(TOLERANCES)
    for name, atol in TOLERANCES.items():
        reference = expected[f"tc.{name}" if name.startswith("stu.") else f"tc.out.{name}"]
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], reference, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("runner", ["torch", "onnxruntime"])
def test_users_without_history_or_candidates(exported: Callable[[str], Path], golden: Path, runner: str) -> None:
    """Leaving out user 1's candidates and user 2's history leaves all other tokens as they are.

    User 1's candidates ask at the time of the last event here, since that is the end of time without them.
    """
    model = read_model_folder(exported("fp32"))
    config = model.ranking_config
    tensors = read_tensors(golden / "caseA" / "inputs.safetensors")
    uih, candidates = (jagged_features(tensors, side) for side in ("uih", "cand"))

    ends = np.cumsum(uih["action_timestamp"].lengths)
    asked = candidates["item_query_time"].values.copy()
    asked[7:14] = uih["action_timestamp"].values[ends[1] - 1]
    candidates["item_query_time"] = Jagged(asked, candidates["item_query_time"].lengths)

    def run(history: Features, items: Features) -> dict[str, np.ndarray]:
        return score(model, pack_request(config, history, items), runner=runner, norm=68.0, taps=True)

    whole = run(users_of(uih, [0, 1, 3]), users_of(candidates, [0, 1, 3]))
    part = run(
        users_of(uih, [0, 1, 2, 3], lambda name, user: name == "user_id" or user != 2),
        users_of(candidates, [0, 1, 2, 3], lambda _, user: user != 1),
    )
    assert part["preds"].shape == (1, 21) and part["stu.0.out"].shape[0] == (1 + 5 + 7) + (1 + 60) + (1 + 7) + 41
    np.testing.assert_allclose(part["preds"][:, :7], whole["preds"][:, :7], atol=1e-5)
    np.testing.assert_allclose(part["preds"][:, 14:], whole["preds"][:, 14:], atol=1e-5)
    np.testing.assert_allclose(part["stu.2.out"][13:74], whole["stu.2.out"][13:74], atol=1e-4)
    np.testing.assert_allclose(part["stu.2.out"][-41:], whole["stu.2.out"][-41:], atol=1e-4)


def test_bad_ids_and_policies(
    exported: Callable[[str], Path], golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = read_tensors(golden / "caseA" / "inputs.safetensors")
    ids = tensors["uih.item_id.values"].copy()
    ids[3] = 400
    write_tensors(tmp_path / "in.safetensors", tensors | {"uih.item_id.values": ids})
    arguments = ["score", "--model", str(exported("fp32")), "--inputs", str(tmp_path / "in.safetensors")]
    arguments += ["--out", str(tmp_path / "out.safetensors")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "uih_ids" in error and "item_id" in error and "[3, 0]" in error and "400" in error
    assert not (tmp_path / "out.safetensors").exists()
    for policy in ("clamp", "zero"):
        assert main([*arguments, "--id-policy", policy, "--json", "--stage-by-stage"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["attention_norm"] == "fixed:128" and facts["tensors"]["preds"] == [1, 28]
        rows = read_tensors(tmp_path / "out.safetensors")["uih_embeddings"]
        assert np.any(rows[3, :32]) == (policy == "clamp")


def test_nothing_to_score_is_refused(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = read_tensors(golden / "caseA" / "inputs.safetensors")
    uih, candidates = (jagged_features(tensors, side) for side in ("uih", "cand"))
    empty = users_of(candidates, [0, 1], lambda *_: False)
    write_features(tmp_path / "in.safetensors", users_of(uih, [0, 1]), empty)
    with pytest.raises(Exception, match=r"in\.safetensors: no user has a candidate"):
        pack_file(debug(), tmp_path / "in.safetensors")


def test_missing_feature_is_named(golden: Path, tmp_path: Path) -> None:
    tensors = read_tensors(golden / "caseA" / "inputs.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if ".item_category_id." not in name}
    write_tensors(tmp_path / "in.safetensors", rest)
    with pytest.raises(Exception, match=r"in\.safetensors: history feature 'item_category_id' is missing"):
        pack_file(debug(), tmp_path / "in.safetensors")


def test_stand_ins_fill_the_gaps() -> None:
    histories = [[5] * 19, [6], [7] * 20, [], []]
    packed = {
        "uih_offsets": np.cumsum([0, *map(len, histories)]),
        "uih_timestamps": np.array([time for history in histories for time in history]),
        "contextual_ids": np.arange(5)[:, None],
        "candidate_offsets": np.array([0, 0, 2, 2, 3, 3], dtype=np.int32),
        "candidate_ids": np.array([[7, 1], [8, 1], [9, 2]]),
        "candidate_timestamps": np.array([70, 80, 90]),
    }
    feed, answered = with_stand_ins(debug(), packed)
    assert feed["candidate_offsets"].tolist() == [0, 1, 3, 4, 5, 6]
    assert feed["candidate_ids"][:, 0].tolist() == [7, 7, 8, 7, 9, 7]
    assert feed["candidate_timestamps"].tolist() == [5, 70, 80, 7, 90, 0]
    assert answered.tolist() == [False, True, True, False, True, False]
    assert feed["contextual_ids"].ravel().tolist() == [-1, 1, 2, 3, -1]
    assert packed["candidate_ids"].shape == (3, 2) and packed["contextual_ids"].min() == 0


def test_reference_token_order() -> None:
    packed = {"uih_offsets": np.array([0, 2, 2, 3]), "candidate_offsets": np.array([0, 1, 3, 3])}
    ours = ["c0", "h0", "h1", "c1", "c2", "h2", "x0", "x1", "x2"]
    order = reference_token_order(debug(), packed)
    assert [ours[i] for i in order] == ["c0", "h0", "h1", "x0", "c1", "x1", "x2", "c2", "h2"]


def test_unused_features_of_a_file_may_be_anything(golden: Path, tmp_path: Path) -> None:
    tensors = read_tensors(golden / "caseA/inputs.safetensors")
    config = load_config(golden / "caseA/config.json")
    expected = pack_file(config, golden / "caseA/inputs.safetensors")
    tensors["uih.label.values"] = np.array([0.5, np.nan], dtype=np.float32)
    tensors["uih.label.lengths"] = np.array([7])
    write_tensors(tmp_path / "in.safetensors", tensors)
    packed = pack_file(config, tmp_path / "in.safetensors")
    assert all(np.array_equal(packed[name], expected[name]) for name in expected)


def test_chain_opens_and_closes_its_stages(fake_model: ModelFolder, fake_runner: Callable[..., Runner]) -> None:
    stages = [fake_runner(fake_model, stage) for stage in ("embedding_lookup", "hstu", "mlp_head")]
    with Chain(fake_model, stages):
        assert [stage.entered for stage in stages] == [1, 1, 1]
    assert [stage.entered for stage in stages] == [0, 0, 0]
