"""RMS norm and gate as two Triton kernels: each input is read once, each output written once.

`z = x` (`x f(gate)` where GATE_FIRST), `n = z / sqrt(mean(z^2) + eps)`, `out = n weight f(gate)` (`n weight`).
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(pointer, token, head, v, mask, stride, V: tl.constexpr, ACC: tl.constexpr):
    """Rows `(token, head)` of a tensor whose tokens are `stride` apart, `[BR,BV]`; zeros where masked."""
    at = token.to(tl.int64) * stride + head * V
    return tl.load(pointer + at[:, None] + v[None, :], mask=mask, other=0.0).to(ACC)


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
def locate(tile, rows, HEADS: tl.constexpr, SHARED: tl.constexpr, BR: tl.constexpr):
    """Token and head of a tile's rows, and which rows there are. Heads with weights of their own are programs apart."""
    row = tile * BR + tl.arange(0, BR)
    if SHARED:
        return row // HEADS, row % HEADS, row < rows
    else:
        return row, tl.zeros_like(row) + tl.program_id(1), row < rows


@triton.jit
def load_weight(weight, v, SHARED: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr):
    """The weight of this program's head, `[1,BV]`."""
    if not SHARED:
        weight += tl.program_id(1) * V
    return tl.load(weight + v, mask=v < V, other=0.0).to(ACC)[None, :]


@triton.jit
def forward(
    x,
    weight,
    gate,
    out,
    rows,
    x_stride,
    gate_stride,
    eps,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """BR rows."""
    v = tl.arange(0, BV)
    token, head, real = locate(tl.program_id(0), rows, HEADS, SHARED, BR)
    mask = real[:, None] & (v < V)[None, :]
    z = load_tile(x, token, head, v, mask, x_stride, V, ACC)
    if gate is not None:
        factor, _ = activate(load_tile(gate, token, head, v, mask, gate_stride, V, ACC), SILU)
        if GATE_FIRST:
            z *= factor
    result = z * tl.rsqrt(tl.sum(z * z, 1) / V + eps)[:, None] * load_weight(weight, v, SHARED, V, ACC)
    if gate is not None and not GATE_FIRST:
        result *= factor
    store_tile(out, result, token, head, v, mask, HEADS * V, V)


@triton.jit
def backward(
    x,
    weight,
    gate,
    d_out,
    dx,
    d_gate,
    d_weight,
    rows,
    tiles,
    x_stride,
    gate_stride,
    eps,
    HEADS: tl.constexpr,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
):
    """`tiles` times BR rows, and their part of the weight's gradient, `[programs,V]` or `[programs,H,V]`."""
    v = tl.arange(0, BV)
    w = load_weight(weight, v, SHARED, V, ACC)
    d_w = tl.zeros((BV,), ACC)
    for i in range(tiles):
        token, head, real = locate(tl.program_id(0) * tiles + i, rows, HEADS, SHARED, BR)
        mask = real[:, None] & (v < V)[None, :]
        of_x = load_tile(x, token, head, v, mask, x_stride, V, ACC)
        grad = load_tile(d_out, token, head, v, mask, HEADS * V, V, ACC)
        z = of_x
        if gate is not None:
            factor, slope = activate(load_tile(gate, token, head, v, mask, gate_stride, V, ACC), SILU)
            if GATE_FIRST:
                z = of_x * factor
        scale = tl.rsqrt(tl.sum(z * z, 1) / V + eps)[:, None]
        n = z * scale
        if gate is not None and not GATE_FIRST:
            store_tile(d_gate, grad * n * w * slope, token, head, v, mask, HEADS * V, V)
            grad *= factor
        d_w += tl.sum(grad * n, 0)
        d_n = grad * w
        dz = scale * (d_n - n * (tl.sum(d_n * n, 1) / V)[:, None])
        if gate is not None and GATE_FIRST:
            store_tile(d_gate, dz * of_x * slope, token, head, v, mask, HEADS * V, V)
            dz *= factor
        store_tile(dx, dz, token, head, v, mask, HEADS * V, V)
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(d_weight + at * V + v, d_w, mask=v < V)
