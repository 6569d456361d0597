"""Deployments that match their digests, and are not as they should be."""

import hashlib
import json

OFF_BY_A_LITTLE = """
from hstu_trt.serving.models.triton_models import StepModel

class TritonPythonModel(StepModel):
    def _load(self, model):
        super()._load(model)
        self._stage = Off(self._stage)

class Off:
    def __init__(self, stage):
        self._stage = stage

    def infer(self, tensors):
        return {name: array + array.dtype.type(0.01) for name, array in self._stage.infer(tensors).items()}
"""


def replace_file(deployment, name, text):
    (deployment / name).write_text(text)
    path = deployment / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    path.write_text(json.dumps(manifest))
