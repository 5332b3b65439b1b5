"""Checks of what is compiled or built: Triton kernels, the CUDA extension, public networks."""
