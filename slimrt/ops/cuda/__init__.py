"""The CUDA backend: CuPy's arrays and streams, and the kernels of ``kernels_cu``."""
