"""The ``cuda`` runner: the ranking model on one GPU, from our kernels, cuBLAS and CUDA graphs."""
