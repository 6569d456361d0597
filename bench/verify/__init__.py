"""``hstu-trt bench verify-tensorrt``: everything that needs TensorRT, and the support matrix."""
