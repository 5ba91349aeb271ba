"""Kernels in Triton, for GPUs: device code and what launches it; the backends that use it are the operators' own.

Nothing here was run on a GPU yet: the kernels are checked in Triton's interpreter and in what they compile to.
"""
