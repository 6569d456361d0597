"""Runs hstu.onnx of the deployment's model."""

from hstu_trt.serving.models.triton_models import StepModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
