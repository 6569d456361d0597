"""A GPU without enough free memory: the client is told to come later, and the model lives."""

import importlib
import sys
import types

import numpy as np
import pytest

from hstu_trt.contract.errors import DeviceMemoryError

pytestmark = pytest.mark.faults
KINDS = {"StepModel": "triton_models", "FusedModel": "fused_model"}
OTHER = np.ones(1, np.float32)


class TritonError(Exception):
    UNAVAILABLE, INTERNAL, INVALID_ARG = "UNAVAILABLE", "INTERNAL", "INVALID_ARG"

    def __init__(self, text, code):
        self.text, self.code = text, code


@pytest.fixture
def triton_models(monkeypatch):
    """The module as a stub has it, with a stand-in of the backend's utilities."""
    utilities = types.ModuleType("triton_python_backend_utils")
    utilities.logged = []
    utilities.Logger = types.SimpleNamespace(log_error=utilities.logged.append)
    utilities.TritonError = TritonError
    utilities.InferenceResponse = lambda tensors=(), error=None: types.SimpleNamespace(tensors=tensors, error=error)
    utilities.Tensor = lambda name, array: (name, array)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utilities)
    modules = [
        f"hstu_trt.serving.models.{name}"
        for name in ("live_metrics", "front_door", "triton_base", "triton_models", "fused_model")
    ]
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield {
        kind: getattr(importlib.import_module(f"hstu_trt.serving.models.{home}"), kind) for kind, home in KINDS.items()
    }
    for module in modules:
        sys.modules.pop(module, None)


class Stage:
    """Lacks memory at the second request."""

    def __init__(self):
        self.calls = 0

    def infer(self, tensors):
        self.calls += 1
        if self.calls == 2:
            raise DeviceMemoryError("Tried to allocate 2.00 GiB. GPU 0 of host gpu17 has 1.00 GiB left")
        return {"preds": OTHER}

    def answer_many(self, requests):
        return [self.infer(request)["preds"] for request in requests]


@pytest.mark.parametrize("kind", KINDS)
def test_unavailable_and_the_next_request_is_answered(triton_models, kind):
    model = object.__new__(triton_models[kind])
    model._name, model._stage, model._live, model._metrics = "hstu", Stage(), None, None
    model._events = types.SimpleNamespace(request=lambda *told: model.told.append(told))
    model.told = []
    model._tensors = lambda request: {}
    model._response = lambda scores, request: types.SimpleNamespace(tensors=[("preds", scores)], error=None)
    answer = model._answer_each if kind == "StepModel" else model._answer_all
    request = types.SimpleNamespace(request_id=lambda: "a7\n", requested_output_names=lambda: ["preds"])
    answers = [answer([request])[0] for _ in range(3)]
    assert [answer.error is None for answer in answers] == [True, False, True]
    assert answers[1].error.code == "UNAVAILABLE"
    assert "not enough GPU memory for this request now; send a smaller one, or later" in answers[1].error.text
    assert "gpu17" not in answers[1].error.text, "what the machine is called is not the client's business"
    assert [told[:2] for told in model.told] == [("a7\n", "UNAVAILABLE")]
    (logged,) = sys.modules["triton_python_backend_utils"].logged
    assert logged == "hstu [request 'a7\\n']: Tried to allocate 2.00 GiB. GPU 0 of host gpu17 has 1.00 GiB left"
