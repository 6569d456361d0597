"""Looks ids up in the host tables of the deployment."""

from hstu_trt.serving.models.triton_models import EmbeddingLookupModel as TritonPythonModel

__all__ = ["TritonPythonModel"]
