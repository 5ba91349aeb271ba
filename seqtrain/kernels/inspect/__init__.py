"""Examining Triton kernels without a GPU: interpreted on the CPU, compiled for GPUs, counted and reported."""
