"""Triton kernels and the code that launches them; each operator's own `triton` module is the backend that uses them.

Tested on an H100 (tests/gpu). For other GPUs they are compiled and their machine code is checked, but not run
(`seqtrain.kernels.inspect`).
"""
