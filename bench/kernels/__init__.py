"""``hstu-trt bench kernels``: our attention kernels, checked, then timed beside PyTorch."""
