"""Runs ranking_fused.onnx on all waiting requests at once."""

from hstu_trt.serving.triton_models import FusedModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
