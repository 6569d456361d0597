"""Every lint rule: silent on what assemble writes, and able to fail."""

import pytest

from hstu_trt.contract.errors import GateError
from hstu_trt.serving import lint, pbtxt
from hstu_trt.serving.assemble import Options, assemble


@pytest.fixture
def deployment(make_model, tmp_path):
    return assemble(make_model(), tmp_path / "out", Options())


def as_tensorrt(config):
    config.backend, config.platform = "", "tensorrt_plan"


def no_output_scatter(config):
    as_tensorrt(config)
    config.instance_group[0].profile.append("0")


def profile_forgotten(config):
    as_tensorrt(config)
    config.batch_output.add(target_name=["preds"], kind=1, source_input=["candidate_ids"])


def batch_input_for_python(config):
    config.batch_input.add(target_name=["offsets"], data_type=8, source_input=["uih_ids"])


def int64_batch_input(config):
    config.platform, config.backend = "", "onnxruntime"
    config.batch_input.add(target_name=["offsets"], data_type=9, source_input=["uih_ids"])


def step_of(config, name):
    return next(step for step in config.ensemble_scheduling.step if step.model_name == name)


# rule, model, how to break it, what the message names
BREAKS = [
    ("folder-name", "hstu", lambda c: setattr(c, "name", "hstu2"), "hstu2"),
    ("R1-ragged-ensemble", "ranking", lambda c: setattr(c.input[0], "allow_ragged_batch", True), "uih_ids"),
    ("R2-ragged-dims", "ranking_fused", lambda c: c.input[0].dims.append(4), "flatten"),
    ("R3-batch-input", "ranking_fused", batch_input_for_python, "ignores batch_input"),
    ("R3-batch-input", "ranking_fused", int64_batch_input, "TYPE_INT32"),
    ("R4-ragged-output", "ranking_fused", no_output_scatter, "BATCH_SCATTER"),
    ("R5-profile", "ranking_fused", profile_forgotten, "profile"),
    ("R7-queue-policy", "ranking_fused", lambda c: setattr(c.dynamic_batching, "priority_levels", 2), "500 ms"),
    (
        "R7-queue-policy",
        "ranking_fused",
        lambda c: setattr(c.dynamic_batching.default_queue_policy, "max_queue_size", 5),
        "500 ms",
    ),
    ("R17-unbounded-queue", "embedding_lookup", lambda c: c.parameters.pop("queue"), "'queue'"),
    ("R17-unbounded-queue", "ranking_fused", lambda c: pbtxt.set_parameter(c, "queue", "0"), "give 1 or more"),
    (
        "R8-queue-delay",
        "ranking_fused",
        lambda c: c.dynamic_batching.preferred_batch_size.append(8),
        "preferred_batch_size",
    ),
    ("R9-cuda-graphs", "hstu", lambda c: setattr(c.optimization.cuda, "graphs", True), "stale"),
    ("R10-implicit-state", "hstu", lambda c: c.sequence_batching.state.add(input_name="s"), "state"),
    ("R12-contract", "hstu", lambda c: c.input[0].dims.insert(0, -1), "uih_embeddings"),
    ("R12-contract", "mlp_head", lambda c: setattr(c, "max_batch_size", 8), "max_batch_size must be 0"),
    ("R12-contract", "mlp_head", lambda c: c.output.add(name="extra", data_type=11, dims=[1]), "extra"),
    ("R12-contract", "ranking", lambda c: c.input.pop(), "is missing"),
    ("R13-ensemble-wiring", "mlp_head", lambda c: setattr(c.input[0], "data_type", 10), "TYPE_FP16"),
    ("R13-ensemble-wiring", "ranking", lambda c: setattr(step_of(c, "hstu"), "model_version", -1), "latest version"),
    ("R13-ensemble-wiring", "ranking", lambda c: setattr(step_of(c, "hstu"), "model_name", "hsut"), "hsut"),
    ("R13-ensemble-wiring", "ranking", lambda c: step_of(c, "hstu").input_map.pop("uih_actions"), "goes to no step"),
    ("R13-ensemble-wiring", "ranking", lambda c: step_of(c, "hstu").output_map.clear(), "nothing makes"),
    ("R13-ensemble-wiring", "ranking", lambda c: step_of(c, "hstu").output_map.update({"b": "c"}), "no output 'b'"),
    ("R14-response-cache", "hstu", lambda c: setattr(c.response_cache, "enable", True), "response_cache"),
    ("R16-tiers", "ranking_fused", lambda c: pbtxt.set_parameter(c, "tiers", "../../tables.json"), "go together"),
    ("R15-gpus", "hstu", lambda c: c.instance_group[0].gpus.extend([0, 1]), "one server per GPU"),
]


def test_assembled_repository_is_clean(deployment):
    assert lint.lint(deployment.repository, deployment.model) == []


@pytest.mark.parametrize(("rule", "name", "break_it", "names"), BREAKS)
def test_rule_fails(deployment, rule, name, break_it, names):
    path = deployment.repository / name / pbtxt.CONFIG_FILE
    config = pbtxt.read_config(path)
    break_it(config)
    path.write_text(pbtxt.config_text(config))
    findings = [f for f in lint.lint(deployment.repository, deployment.model) if f.rule == rule]
    assert any(names in finding.message for finding in findings), findings


def test_delays_of_steps_add_up(deployment):
    for name in ("hstu", "mlp_head"):
        path = deployment.repository / name / pbtxt.CONFIG_FILE
        config = pbtxt.read_config(path)
        config.dynamic_batching.max_queue_delay_microseconds = 100
        path.write_text(pbtxt.config_text(config))
    assert "hstu, mlp_head add up" in str(lint.lint(deployment.repository, deployment.model))


def test_stray_folder_and_missing_version_are_found(deployment):
    (deployment.repository / "__pycache__").mkdir()
    (deployment.repository / "ranking" / "1").rename(deployment.repository / "ranking" / "one")
    with pytest.raises(GateError, match=r"folder-stray: .*__pycache__ is not a model") as caught:
        lint.require_clean(deployment.repository, deployment.model)
    assert "folder-version: ranking has no version folder" in str(caught.value)


def test_every_rule_has_a_break():
    elsewhere = {"folder-stray", "folder-version", "R11-plan", "R18-not-served"}
    assert {rule for rule, *_ in BREAKS} | elsewhere == set(lint.RULES)
