"""CUDA kernels of HSTU attention, their library, and its torch ops. Only the modules that run kernels need torch."""
