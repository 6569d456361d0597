"""The ONNX Runtime runner on stand-in graphs: checks at load, checks of a feed, and users one by one."""

import dataclasses

import numpy as np
import pytest

from hstu_trt.contract.errors import ArtefactError, ConfigError, HstuTrtError, InputError
from hstu_trt.contract.runner import Runner
from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner

STAGES = ["embedding_lookup", "hstu", "mlp_head", "ranking_fused", "hstu_taps"]
BATCHES = {
    "one user": ([5], [3]),
    "one user without history": ([0], [1]),
    "several": ([3, 1, 7], [2, 5, 1]),
    "an empty history first, between and last": ([0, 4, 0, 2, 0], [1, 3, 2, 1, 4]),
    "no history at all": ([0, 0], [2, 1]),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("batch", BATCHES)
def test_every_stage_answers_as_its_spec_says(model, make_feed, stage, batch):
    with OnnxRuntimeRunner(model, stage, threads=1) as runner:
        answer = runner.infer(make_feed(runner.spec, *BATCHES[batch]))
        assert list(answer) == [spec.name for spec in runner.spec.outputs]
        for spec in runner.spec.outputs:
            assert answer[spec.name].dtype == spec.dtype
            assert answer[spec.name].shape[1] == spec.dims[1]
    assert isinstance(runner, Runner)


@pytest.mark.parametrize("stage", ["hstu", "ranking_fused", "hstu_taps"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("norm_per_user", [False, True])
def test_users_one_by_one_answer_as_in_a_batch(model, make_feed, stage, batch, norm_per_user):
    history, candidates = BATCHES[batch]
    one_by_one = OnnxRuntimeRunner(model, stage, threads=1)
    together = OnnxRuntimeRunner(model, stage, threads=1, per_user=False)
    feed = make_feed(one_by_one.spec, history, candidates, norms=len(history) if norm_per_user else 1)
    actual, expected = one_by_one.infer(feed), together.infer(feed)
    assert list(actual) == list(expected)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6, err_msg=name)


def test_taps_keep_the_split_layout(model, make_feed):
    """The stand-in's tap holds the contextual row itself: [prefix of user 0 | prefix of user 1 | candidates]."""
    runner = OnnxRuntimeRunner(model, "hstu_taps", threads=1)
    feed = make_feed(runner.spec, [2, 0], [1, 2])
    answer = runner.infer(feed)
    tap = answer["stu.0.out"]
    assert tap.shape == (2 + 2 + 3, 4)
    np.testing.assert_array_equal(tap[[0, 3]], feed["contextual_embeddings"])
    np.testing.assert_array_equal(tap[4:], answer["user_embeddings"])


def test_a_batch_is_really_split(model, make_feed, monkeypatch):
    runner = OnnxRuntimeRunner(model, "hstu", threads=1)
    seen, run = [], runner._run
    monkeypatch.setattr(runner, "_run", lambda feed: (seen.append(feed["uih_offsets"].tolist()), run(feed))[1])
    runner.infer(make_feed(runner.spec, [3, 0, 2], [1, 1, 1]))
    assert seen == [[0, 3], [0, 0], [0, 2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"uih_offsets": None}, "'uih_offsets' int32 .* is missing"),
        ({"uih_offset": np.zeros(3, np.int32)}, "stage hstu takes no tensor 'uih_offset'"),
        ({"uih_offsets": np.asarray([0, 3, 5], np.int64)}, "'uih_offsets' must be int32, got int64"),
        ({"uih_offsets": np.asarray([0, 3, 4], np.int32)}, "'uih_offsets' ends with 4"),
        ({"candidate_offsets": np.asarray([0, 2, 2], np.int32)}, "user 1 has no candidates"),
        ({"uih_embeddings": np.full((5, 8), np.nan, np.float32)}, r"'uih_embeddings' holds nan at \[0, 0\]"),
        ({"attention_norm": np.ones(3, np.float32)}, "'attention_norm' has 3 norms, but 'uih_offsets' has 2 users"),
        ({"attention_norm": np.zeros(1, np.float32)}, r"'attention_norm' holds 0.0 at \[0\]"),
        ({"contextual_embeddings": np.ones((1, 4), np.float32)}, "'contextual_embeddings' has 1 users"),
    ],
)
def test_a_wrong_feed_is_refused(model, make_feed, change, message):
    runner = OnnxRuntimeRunner(model, "hstu", threads=1)
    feed = {**make_feed(runner.spec, [3, 2], [1, 1]), **change}
    with pytest.raises(InputError, match=message):
        runner.infer({name: tensor for name, tensor in feed.items() if tensor is not None})


def test_flat_ids_must_fill_their_tokens(model, make_feed):
    runner = OnnxRuntimeRunner(model, "ranking_fused", threads=1)
    feed = make_feed(runner.spec, [3, 2], [1, 1])
    with pytest.raises(InputError, match="'uih_ids' has 9 ids, but 'uih_timestamps' has 5 uih_tokens of 2 ids each"):
        runner.infer({**feed, "uih_ids": feed["uih_ids"][:-1]})


def test_an_error_of_onnx_runtime_names_the_stage(model, make_feed):
    runner = OnnxRuntimeRunner(model, "embedding_lookup", threads=1)
    feed = make_feed(runner.spec, [3], [1])
    feed["uih_ids"][1] = 99  # the stand-in gathers without a check
    with pytest.raises(HstuTrtError, match=r"stage embedding_lookup: ONNX Runtime failed: .*99"):
        runner.infer(feed)


def test_an_unknown_stage_is_refused(model):
    with pytest.raises(ConfigError, match="no stage 'hstuu': choose from embedding_lookup, hstu"):
        OnnxRuntimeRunner(model, "hstuu")


def test_no_threads_are_refused(model):
    with pytest.raises(ConfigError, match="threads"):
        OnnxRuntimeRunner(model, "hstu", threads=0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("uih_timestamps", "uih_seconds", "its inputs are .*uih_seconds.*, the contract says"),
        ("user_embeddings", "users_embeddings", "its outputs are users_embeddings"),
        ("float[uih_tokens, 8]", "float[3, 8]", r"'uih_embeddings' is tensor\(float\) \[3, 8\]"),
        ("int32[users_plus_1] uih_offsets", "int64[users_plus_1] uih_offsets", r"'uih_offsets' is tensor\(int64\)"),
    ],
)
def test_a_graph_that_is_not_the_contract_s_is_refused(write_model, graphs, old, new, message):
    model = write_model({"hstu": graphs["hstu"].replace(old, new)})
    with pytest.raises(ArtefactError, match=message):
        OnnxRuntimeRunner(model, "hstu")


def test_a_wrong_output_width_is_refused(write_model, graphs):
    wide = graphs["mlp_head"].replace("Add (a, b)", "Identity (user_embeddings)").replace("[candidates, 1]", "[n, 4]")
    with pytest.raises(ArtefactError, match=r"output 'preds' is .*4\], the contract says float32 \[candidates, 1\]"):
        OnnxRuntimeRunner(write_model({"mlp_head": wide}), "mlp_head")


def test_swapped_outputs_are_refused(write_model, graphs):
    first, second = "float[candidates, 4] user_embeddings", "float[tokens, 4] tap"
    swapped = graphs["hstu_taps"].replace(f"{first}, {second}", f"{second}, {first}")
    with pytest.raises(ArtefactError, match=r"its outputs are stu.0.out, user_embeddings"):
        OnnxRuntimeRunner(write_model({"hstu_taps": swapped}), "hstu_taps")


def test_damaged_and_missing_files_name_the_remedy(model):
    model.onnx("hstu").write_bytes(b"not onnx")
    with pytest.raises(ArtefactError, match=r"hstu.onnx: ONNX Runtime cannot load it.*hstu-trt export"):
        OnnxRuntimeRunner(model, "hstu")
    model.onnx("mlp_head").unlink()
    with pytest.raises(ArtefactError, match=r"mlp_head.onnx is missing"):
        OnnxRuntimeRunner(model, "mlp_head")


def test_limits_are_enforced(model, make_feed):
    tight = dataclasses.replace(model, limits=dataclasses.replace(model.limits, history=2))
    runner = OnnxRuntimeRunner(tight, "hstu", threads=1)
    with pytest.raises(InputError, match="user 1 has 3 history"):
        runner.infer(make_feed(runner.spec, [2, 3], [1, 1]))


@pytest.mark.parametrize("stage", ["hstu", "ranking_fused", "hstu_taps"])
@pytest.mark.parametrize("batch", BATCHES)
def test_users_side_by_side_answer_as_one_by_one(model, make_feed, stage, batch):
    one_by_one = OnnxRuntimeRunner(model, stage, threads=1)
    with OnnxRuntimeRunner(model, stage, threads=1, users_at_once=3, spin=False) as side_by_side:
        feed = make_feed(one_by_one.spec, *BATCHES[batch])
        actual, expected = side_by_side.infer(feed), one_by_one.infer(feed)
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)


@pytest.mark.parametrize(("history", "threads"), [(8, 1), (10_000_000, 0)])
def test_a_server_gives_small_operators_one_thread(model, history, threads):
    """The stand-in is a few wide: only with a very long history do its products count as large."""
    limits = dataclasses.replace(model.limits, history=history, batch_history=max(history, model.limits.batch_history))
    runner = OnnxRuntimeRunner.for_serving(dataclasses.replace(model, limits=limits), "mlp_head")
    assert runner._session.get_session_options().intra_op_num_threads == threads


def test_no_users_at_once_are_refused(model):
    with pytest.raises(ConfigError, match="users at once must be >= 1"):
        OnnxRuntimeRunner(model, "hstu", users_at_once=0)
