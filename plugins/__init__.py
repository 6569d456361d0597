"""CUDA kernels, their build and library, torch ops, TensorRT plugins. Only the modules that run kernels need torch."""
