"""``hstu-trt bench model``: the whole model in process on a CUDA GPU, beside PyTorch."""
