"""RMS norm and gate as two Triton kernels: each input is read once, each output written once.

`z = x` (`x f(gate)` where GATE_FIRST), `n = z / sqrt(mean(z^2) + eps)`, `out = n weight f(gate)` (`n weight`).
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, token, head, v, mask, stride, M: tl.constexpr):
    """Rows `(token, head)` of a tensor whose tokens are `stride` apart, `[BR,BV]`; zeros where masked."""
    at = token.to(tl.int64) * stride + head * M.V
    return tl.load(pointer + at[:, None] + v[None, :], mask=mask, other=0.0).to(M.ACC)


@triton.jit
def store_tile(pointer, tile, token, head, v, mask, stride, V: tl.constexpr):
    """Writes what `load_tile` reads, in the pointer's dtype."""
    at = token.to(tl.int64) * stride + head * V
    tl.store(pointer + at[:, None] + v[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def activate(gate, SILU: tl.constexpr):
    """`f(gate)` and its derivative."""
    s = tl.sigmoid(gate)
    if SILU:
        return gate * s, s * (1 + gate * (1 - s))
    else:
        return s, s * (1 - s)


@triton.jit
def locate(tile, rows, M: tl.constexpr):
    """Token and head of a tile's rows, and which rows there are. Heads with weights of their own are programs apart."""
    row = tile * M.BR + tl.arange(0, M.BR)
    if M.SHARED:
        return row // M.HEADS, row % M.HEADS, row < rows
    else:
        return row, tl.zeros_like(row) + tl.program_id(1), row < rows


@triton.jit
def load_weight(weight, v, M: tl.constexpr):
    """The weight of this program's head, `[1,BV]`."""
    if not M.SHARED:
        weight += tl.program_id(1) * M.V
    return tl.load(weight + v, mask=v < M.V, other=0.0).to(M.ACC)[None, :]


@triton.jit
def forward(x, weight, gate, out, rows, x_stride, gate_stride, eps, M: tl.constexpr):
    """BR rows."""
    v = tl.arange(0, M.BV)
    token, head, real = locate(tl.program_id(0), rows, M)
    mask = real[:, None] & (v < M.V)[None, :]
    z = load_tile(x, token, head, v, mask, x_stride, M)
    if gate is not None:
        factor, _ = activate(load_tile(gate, token, head, v, mask, gate_stride, M), M.SILU)
        if M.GATE_FIRST:
            z *= factor
    result = z * tl.rsqrt(tl.sum(z * z, 1) / M.V + eps)[:, None] * load_weight(weight, v, M)
    if gate is not None and not M.GATE_FIRST:
        result *= factor
    store_tile(out, result, token, head, v, mask, M.HEADS * M.V, M.V)


@triton.jit
def backward(x, weight, gate, d_out, dx, d_gate, d_weight, rows, tiles, x_stride, gate_stride, eps, M: tl.constexpr):
    """`tiles` times BR rows, and their part of the weight's gradient, `[programs,V]` or `[programs,H,V]`."""
    v = tl.arange(0, M.BV)
    w = load_weight(weight, v, M)
    d_w = tl.zeros((M.BV,), M.ACC)
    for i in range(tiles):
        token, head, real = locate(tl.program_id(0) * tiles + i, rows, M)
        mask = real[:, None] & (v < M.V)[None, :]
        of_x = load_tile(x, token, head, v, mask, x_stride, M)
        grad = load_tile(d_out, token, head, v, mask, M.HEADS * M.V, M)
        z = of_x
        if gate is not None:
            factor, slope = activate(load_tile(gate, token, head, v, mask, gate_stride, M), M.SILU)
            if M.GATE_FIRST:
                z = of_x * factor
        scale = tl.rsqrt(tl.sum(z * z, 1) / M.V + eps)[:, None]
        n = z * scale
        if gate is not None and not M.GATE_FIRST:
            store_tile(d_gate, grad * n * w * slope, token, head, v, mask, M.HEADS * M.V, M.V)
            grad *= factor
        d_w += tl.sum(grad * n, 0)
        d_n = grad * w
        dz = scale * (d_n - n * (tl.sum(d_n * n, 1) / M.V)[:, None])
        if gate is not None and M.GATE_FIRST:
            store_tile(d_gate, dz * of_x * slope, token, head, v, mask, M.HEADS * M.V, M.V)
            dz *= factor
        store_tile(dx, dz, token, head, v, mask, M.HEADS * M.V, M.V)
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(d_weight + at * M.V + v, d_w, mask=v < M.V)
