"""A product with SwiGLU in its epilogue: two matrices by the same rows, whose results meet before they are written.

`z = x W^T`, W `[2H,K]`: rows of gates, then of values. `out = silu(z_gate) * z_value`; with KEEP z is written, too.
"""

import triton
import triton.language as tl


@triton.jit
def forward(x, weight, out, z, rows, M: tl.constexpr):
    """BR rows of BH hidden channels. Neighboring programs share rows of `x`."""
    row = (tl.program_id(1) * M.BR + tl.arange(0, M.BR)).to(tl.int64)
    channel = tl.program_id(0) * M.BH + tl.arange(0, M.BH)
    k = tl.arange(0, M.BK)
    there, real = row < rows, channel < M.H
    gate = tl.zeros((M.BR, M.BH), M.ACC)
    value = tl.zeros((M.BR, M.BH), M.ACC)
    for start in range(0, M.K, M.BK):
        inside = start + k < M.K
        left = tl.load(x + row[:, None] * M.K + (start + k)[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        at = channel[None, :] * M.K + (start + k)[:, None]
        mask = inside[:, None] & real[None, :]
        gates = tl.load(weight + at, mask=mask, other=0.0).to(left.dtype)
        values = tl.load(weight + M.H * M.K + at, mask=mask, other=0.0).to(left.dtype)
        gate = tl.dot(left, gates, gate, input_precision=M.PRECISION, out_dtype=M.ACC)
        value = tl.dot(left, values, value, input_precision=M.PRECISION, out_dtype=M.ACC)
    mask = there[:, None] & real[None, :]
    if M.KEEP:
        to = z + row[:, None] * (2 * M.H) + channel[None, :]
        tl.store(to, gate.to(z.dtype.element_ty), mask=mask)
        tl.store(to + M.H, value.to(z.dtype.element_ty), mask=mask)
    result = gate * tl.sigmoid(gate) * value
    tl.store(out + row[:, None] * M.H + channel[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def backward(z, d_out, d_z, rows, M: tl.constexpr):
    """What BR rows of the products are owed, `[n,2H]`: read once, written once."""
    row = (tl.program_id(1) * M.BR + tl.arange(0, M.BR)).to(tl.int64)
    channel = tl.program_id(0) * M.BH + tl.arange(0, M.BH)
    mask = (row < rows)[:, None] & (channel < M.H)[None, :]
    at = row[:, None] * (2 * M.H) + channel[None, :]
    gate = tl.load(z + at, mask=mask, other=0.0).to(M.ACC)
    value = tl.load(z + at + M.H, mask=mask, other=0.0).to(M.ACC)
    grad = tl.load(d_out + row[:, None] * M.H + channel[None, :], mask=mask, other=0.0).to(M.ACC)
    s = tl.sigmoid(gate)
    tl.store(d_z + at, (grad * value * s * (1 + gate * (1 - s))).to(d_z.dtype.element_ty), mask=mask)
    tl.store(d_z + at + M.H, (grad * gate * s).to(d_z.dtype.element_ty), mask=mask)
