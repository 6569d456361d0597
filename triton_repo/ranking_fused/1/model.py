"""Looks rows up and runs hstu.onnx and mlp_head.onnx, or one engine, on all waiting requests at once."""

from hstu_trt.serving.models.fused_model import FusedModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
