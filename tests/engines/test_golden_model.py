"""The ONNX Runtime runner and builder on the exported golden checkpoint: real graphs instead of stand-ins."""

import numpy as np
import pytest

from hstu_trt.contract.cli import main as command_line
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.numerics import check
from hstu_trt.contract.tensors import PADDING_ID
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.engines.stages import engine_stages
from hstu_trt.tables.host import HostTables

BATCHES = {
    "no history": ([0], [3]),
    "no history in a batch": ([0, 0], [1, 2]),
    "short and long": ([5, 0, 40, 1], [2, 7, 1, 30]),
}
TABLE_ROWS = {"uih_ids": 23, "candidate_ids": 23, "contextual_ids": 50}
CONSTANTS = {"uih_timestamps": 1_700_000_000, "candidate_timestamps": 1_700_100_000, "attention_norm": 128.0}
TOLERANCE_OF = {"user_embeddings": "hstu", "preds": "ranking_fused"}


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def model(request, exported):
    return read_model_folder(exported(request.param))


def plausible_feed(make_feed, spec, batch):
    """Random ids and embeddings with timestamps in order."""
    feed = make_feed(spec, *batch)
    rng = np.random.default_rng(1)
    for name, tensor in feed.items():
        if name in TABLE_ROWS:
            feed[name] = rng.integers(0, TABLE_ROWS[name], tensor.shape)
        elif name in CONSTANTS:
            feed[name] = (CONSTANTS[name] + 60 * np.arange(len(tensor))).astype(tensor.dtype)
    if "contextual_ids" in feed:
        feed["contextual_ids"][-1] = PADDING_ID
    return feed


@pytest.mark.parametrize("stage", ["hstu", "ranking_fused", "hstu_taps"])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_users_one_by_one_agree_with_the_batch(model, make_feed, stage, batch):
    one_by_one = OnnxRuntimeRunner(model, stage, threads=1)
    together = OnnxRuntimeRunner(model, stage, threads=1, per_user=False)
    feed = plausible_feed(make_feed, one_by_one.spec, batch)
    actual, expected = one_by_one.infer(feed), together.infer(feed)
    assert list(actual) == [spec.name for spec in one_by_one.spec.outputs]
    for name, value in expected.items():
        check(TOLERANCE_OF.get(name, "stu"), model.precision, actual[name], value, name)
        assert np.abs(value.astype(np.float32)).max() > 0.01


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_the_graph_looks_up_what_the_host_tables_hold(model, make_feed, batch):
    runner = OnnxRuntimeRunner(model, "embedding_lookup", threads=1)
    feed = plausible_feed(make_feed, runner.spec, batch)
    answer, tables, config = runner.infer(feed), HostTables.open(model.tables, verify=True), model.ranking_config
    features = {
        "uih": config.uih_features,
        "candidate": config.candidate_features,
        "contextual": config.contextual_slots,
    }
    for group, names in features.items():
        rows = answer[f"{group}_embeddings"]
        expected = tables.lookup_features(names, feed[f"{group}_ids"], padding_id=PADDING_ID, dtype=str(rows.dtype))
        np.testing.assert_array_equal(rows, expected, err_msg=group)


def test_the_tables_are_of_the_model_s_checkpoint(model):
    assert len(model.pair_id) == 64
    assert HostTables.open(model.tables).folder.pair_id == model.pair_id


def test_engines_are_built_from_it(model, tmp_path, capsys):
    command = [
        "engines",
        "--model",
        model.path,
        "--gpu",
        "cpu",
        "--precision",
        model.precision,
        "--out",
        tmp_path / "e",
    ]
    assert command_line([str(word) for word in command]) == 0
    printed = capsys.readouterr().out
    assert all(f"{stage}.onnx" in printed for stage in engine_stages(model))
    assert command_line([str(word) for word in command]) == 0
    assert "up to date" in capsys.readouterr().out
