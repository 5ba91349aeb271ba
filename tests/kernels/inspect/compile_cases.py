"""Kernels compiled by tests/kernels/inspect/test_compile.py, in a process of its own: prints what came out as JSON."""

import json
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from seqtrain.kernels.gpu import target
from seqtrain.kernels.inspect.compile import compiling


@triton.jit
def product(a, b, out, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for i in range(0, K, BK):
        sums = tl.dot(tl.load(a + m * K + i + k[None, :]), tl.load(b + (i + k[:, None]) * BN + n), sums)
    tl.store(out + m * BN + n, sums)


def main() -> None:
    a, b = torch.zeros(128, 256, dtype=torch.bfloat16), torch.zeros(256, 128, dtype=torch.bfloat16)
    out = torch.zeros(128, 128)
    found = []
    for name, warps in (("sm_90", 8), ("sm_90", 1), ("sm_80", 8), ("gfx942", 8)):
        with compiling(name) as kernels:
            product[(1,)](a, b, out, 256, 128, 128, 64, num_warps=warps, num_stages=2, enable_fp_fusion=True)
            assert target() == name
        found += [{**asdict(kernel), "faults": kernel.faults()} for kernel in kernels]
    assert not out.any(), "a kernel ran"
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
