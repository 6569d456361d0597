"""The flavour ``tensorrt``: steps that are plans, a lookup that checks for them, and what is refused."""

import numpy as np
import pytest
from made_engines import STAGES, make_engines

from hstu_trt.contract.errors import ArtefactError, ConfigError, InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.plugin_files import AUTOLOAD_LIBRARY, PLUGINS_VARIABLE
from hstu_trt.serving import lint, pbtxt
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.engine_steps import read_engines
from hstu_trt.serving.models.stages import GuardedLookup
from hstu_trt.serving.requests import pack, sample
from hstu_trt.serving.server import Listen, Tritonserver, find_tritonserver, plan_launch, tensorrt_flags
from hstu_trt.serving.signature import MODELS, signatures
from hstu_trt.serving.starting import start
from hstu_trt.tables.lookup_stage import HostLookup


@pytest.fixture
def deployment(make_model, tmp_path):
    model = make_model(precision="fp16")
    engines = make_engines(tmp_path / "engines", model)
    return assemble(model, tmp_path / "out", Options(flavour="tensorrt", engines=engines, attention_norm="fixed:40"))


def test_steps_become_plans(deployment):
    configs = pbtxt.read_repository(deployment.repository)
    for step in ("hstu", "mlp_head"):
        config = configs[step]
        assert (config.platform, config.backend, config.default_model_filename) == ("tensorrt_plan", "", "model.plan")
        (group,) = config.instance_group
        assert list(group.profile) == ["0", "1"] and list(group.gpus) == [0]
        assert not config.parameters
        assert [path.name for path in (deployment.repository / step / "1").iterdir()] == ["model.plan"]
        assert (deployment.repository / step / "1" / "model.plan").read_text() == f"plan of {step}"
    assert configs["embedding_lookup"].backend == configs["ranking_fused"].backend == "python"
    engines = deployment.repository / "ranking_fused" / pbtxt.parameter(configs["ranking_fused"], "engines")
    assert (engines.resolve() / "ranking_fused.plan").is_file()


def test_signatures_are_the_contracts(deployment):
    configs, model = pbtxt.read_repository(deployment.repository), deployment.model
    wanted = signatures(model.ranking_config, model.limits, "fp16", "tensorrt")
    for name in MODELS:
        found = pbtxt.signature_of(configs[name])
        assert (set(found.inputs), set(found.outputs)) == (set(wanted[name].inputs), set(wanted[name].outputs)), name
    assert "attention_norm" not in {port.name for port in wanted["ranking"].inputs}
    assert wanted["ranking"] == signatures(model.ranking_config, model.limits, "fp16")["ranking"]


def test_the_norm_comes_from_the_lookup(deployment):
    configs = pbtxt.read_repository(deployment.repository)
    lookup, hstu, _ = configs["ranking"].ensemble_scheduling.step
    assert lookup.output_map["attention_norm"] == hstu.input_map["attention_norm"] == "attention_norm"
    assert set(lookup.input_map) == {port.name for port in configs["ranking"].input}
    assert pbtxt.parameter(configs["embedding_lookup"], "attention_norm") == "fixed:40"


def test_the_lint_misses_a_plan(deployment):
    assert lint.lint(deployment.repository, deployment.model, "tensorrt") == []
    (deployment.repository / "hstu" / "1" / "model.plan").rename(deployment.repository / "hstu" / "1" / "model.py")
    findings = [str(finding) for finding in lint.lint(deployment.repository, deployment.model, "tensorrt")]
    assert len(findings) == 2 and all(finding.startswith("R11-plan: hstu") for finding in findings)
    rules = {finding.rule for finding in lint.lint(deployment.repository, deployment.model, "cpu")}
    assert "R12-contract" in rules


REFUSED = {
    "another builder": ({"builder": "tensorrt_rtx"}, "builder 'tensorrt_rtx'"),
    "another export": ({"digest": "0" * 64}, "another export"),
    "a stage is missing": ({"stages": STAGES[:-1]}, "no engine of ranking_fused"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_engines_that_do_not_fit_are_refused(make_model, tmp_path, name):
    changes, said = REFUSED[name]
    model = make_model()
    with pytest.raises(ArtefactError, match=said):
        read_engines(make_engines(tmp_path / "engines", model, **changes), model)


def test_engines_and_flavour_go_together(tmp_path):
    for flavour, engines in (("tensorrt", None), ("cpu", tmp_path)):
        with pytest.raises(ConfigError, match="--engines goes with --flavour tensorrt"):
            Options(flavour=flavour, engines=engines)


def test_the_lookup_checks_for_the_plans(make_model):
    model = make_model()
    request = sample(model.ranking_config, model.limits)
    packed = pack(model.ranking_config, [request])
    stage = GuardedLookup(model, HostLookup(model), 40.0)
    answer = stage.infer(packed)
    assert answer["attention_norm"].tolist() == [40.0] and answer["attention_norm"].dtype == np.float32
    assert {spec.name for spec in model.specs["embedding_lookup"].outputs} < set(answer)
    wrong = packed | {"uih_offsets": np.array([0, 9999], dtype=np.int32)}
    with pytest.raises(InputError, match="uih_offsets"):
        stage.infer(wrong)


def test_flags_of_the_backend(tmp_path, monkeypatch):
    binary = tmp_path / "bin" / "tritonserver"
    with pytest.raises(ArtefactError, match="no TensorRT backend"):
        tensorrt_flags(Tritonserver(binary=binary))
    backend = tmp_path / "backends" / "tensorrt" / "libtriton_tensorrt.so"
    backend.parent.mkdir(parents=True)
    backend.touch()
    monkeypatch.setenv(PLUGINS_VARIABLE, str(tmp_path / "build" / "mine.so"))
    for given in (None, tmp_path / "none.so"):
        with pytest.raises(ArtefactError, match="make plugins"):
            tensorrt_flags(Tritonserver(binary=binary), given)
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "mine.so").touch()
    # The variable that moves the builder's library moves Triton's, beside it.
    for given, library in ((tmp_path / "p.so", tmp_path / "p.so"), (None, tmp_path / "build" / AUTOLOAD_LIBRARY)):
        library.touch()
        flags = tensorrt_flags(Tritonserver(binary=binary), given)
        assert flags == (f"--backend-config=tensorrt,plugins={library}",)


STAND_IN = """
from hstu_trt.serving.models.triton_models import _StageModel


class TritonPythonModel(_StageModel):
    def _load(self, model):
        self._stage = self._runner(model, self._name)
"""


@pytest.mark.triton
def test_the_wiring_around_the_plans_serves(exported, tmp_path):
    """With Python models that take what the plans take, the ensemble scores, and refuses a bad request."""
    model = read_model_folder(exported("fp32"))
    engines = make_engines(tmp_path / "engines", model)
    deployment = assemble(model, tmp_path / "out", Options(flavour="tensorrt", engines=engines))
    for name, config in pbtxt.read_repository(deployment.repository).items():
        folder = deployment.repository / name
        if name in ("hstu", "mlp_head"):
            config.platform, config.backend, config.default_model_filename = "", "python", ""
            del config.instance_group[:]
            config.instance_group.add(kind="KIND_CPU", count=1)
            pbtxt.set_parameter(config, "model_folder", "../../model")
            (folder / "1" / "model.py").write_text(STAND_IN)
        config.parameters.pop("engines", None)
        (folder / pbtxt.CONFIG_FILE).write_text(pbtxt.config_text(config))
    plan = plan_launch(find_tritonserver(), deployment, Listen(grpc_port=0))
    process, ready = start(deployment, plan)
    try:
        assert ready.canary_difference < 1e-5
        packed = pack(model.ranking_config, [sample(model.ranking_config, model.limits)])
        with RankingClient(plan.url, "ranking") as client, pytest.raises(InputError, match="candidate_offsets"):
            client.infer(packed | {"candidate_offsets": np.array([0, 9999], dtype=np.int32)})
    finally:
        assert process.drain() == 0
