"""Products of tokens and a state, each token decayed up to one end of a segment: what sharding a sequence takes.

With `w` the decay of a token up to the segment's end (TO_END: without its own), or from its start (with its own):

    gather:  S = scale sum_t (w_t x_t)^T y_t            spread:  out_t = base_t + scale (w_t x_t) S
    weigh:   d_x_t = scale w_t (y_t S^T)                and what <x_t, d_x_t> gives the log decays in w

`gather` of keys and values is the update of linear attention, and its gradient is `spread` and `weigh`; `spread` of
queries is what they read in an incoming state, and its gradient is `gather` and `weigh`. No chunk waits for another:
`around` is the sum of the log2 decays between a chunk and that end of the segment, computed beforehand.

Tensors as in `matrix`, each row one document; `around` `[B, chunks, H]`, with per-channel decay `[B, chunks, H, K]`.
"""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import (
    LOG2_E,
    load_numbers,
    load_rows,
    store_rows,
    sum_before,
    sum_rows_before,
)


@triton.jit
def places(n, c, tokens, H: tl.constexpr, BT: tl.constexpr):
    """Where chunk c of row and head n of [B, H] begins in tensors of tokens, and where it stands in those of chunks."""
    b = (n // H).to(tl.int64)
    return (b * tokens + c * BT) * H + n % H, (b * tl.cdiv(tokens, BT) + c) * H + n % H


@triton.jit
def load_weighted(
    x,
    log_decay,
    around,
    at,
    near,
    rows,
    column,
    TO_END: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
):
    """A block of K of `(x, w)`, `[BT,BK]` and, by DECAY, `[1,1]`, `[BT,1]` or `[BT,BK]`; ACC."""
    b_x = load_rows(x + at * K, rows, column, H * K, K, BT, BK).to(ACC)
    # Up to the end, the decays of a token are those after it.
    ahead = 1 if TO_END else 0
    count = tl.minimum(rows, BT) - ahead
    if DECAY == 0:
        w = tl.full([1, 1], 1.0, ACC)
    elif DECAY == 1:
        log = load_numbers(log_decay + at + ahead * H, count, H, BT, ACC)
        w = tl.math.exp2(tl.cumsum(log, 0, reverse=TO_END) * LOG2_E + tl.load(around + near))[:, None]
    else:
        d = column + tl.arange(0, BK)
        log = load_rows(log_decay + (at + ahead * H) * K, count, column, H * K, K, BT, BK).to(ACC)
        far = tl.load(around + near * K + d, mask=d < K, other=0.0)
        w = tl.math.exp2(tl.cumsum(log, 0, reverse=TO_END) * LOG2_E + far[None, :])
    return b_x, w


@triton.jit
def gather(
    x,
    y,
    log_decay,
    around,
    out,
    tokens,
    slabs,
    scale,
    TO_END: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S of each slab of a row's chunks, `[slabs, B, H, K, V]`. One program per slab, row, head, block of K and of V."""
    K_BLOCKS: tl.constexpr = (K + BK - 1) // BK
    V_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    block = tl.program_id(0) % (K_BLOCKS * V_BLOCKS)
    row = block // V_BLOCKS * BK
    column = block % V_BLOCKS * BV
    n = tl.program_id(0) // (K_BLOCKS * V_BLOCKS)  # of [slabs, B, H]
    heads = tl.num_programs(0) // (K_BLOCKS * V_BLOCKS * slabs)  # of all rows
    chunks = tl.cdiv(tokens, BT)
    each = tl.cdiv(chunks, slabs)
    first = n // heads * each
    dtype = x.dtype.element_ty
    state = tl.zeros([BK, BV], ACC)
    for c in range(first, tl.minimum(first + each, chunks)):
        at, near = places(n % heads, c, tokens, H, BT)
        rows = tokens - c * BT
        b_x, w = load_weighted(x, log_decay, around, at, near, rows, row, TO_END, H, K, BT, BK, DECAY, ACC)
        b_y = load_rows(y + at * V, rows, column, H * V, V, BT, BV).to(dtype)
        state = tl.dot(tl.trans((b_x * w).to(dtype)), b_y, state, input_precision=PRECISION)
    store_rows(out + (n.to(tl.int64) * K + row) * V, state * scale, K - row, column, V, V, BK, BV)


@triton.jit
def spread(
    x,
    state,
    base,
    log_decay,
    around,
    out,
    tokens,
    scale,
    TO_END: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out`, without `base` where it is None. One program per chunk, row, head and block of V."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % BLOCKS * BV
    chunks = tl.cdiv(tokens, BT)
    n = tl.program_id(0) // BLOCKS // chunks  # of [B, H]
    c = tl.program_id(0) // BLOCKS % chunks
    at, near = places(n, c, tokens, H, BT)
    rows = tokens - c * BT
    dtype = x.dtype.element_ty
    state_at = n.to(tl.int64) * K * V
    b_out = tl.zeros([BT, BV], ACC)
    for d in range(0, K, BK):
        b_x, w = load_weighted(x, log_decay, around, at, near, rows, d, TO_END, H, K, BT, BK, DECAY, ACC)
        b_state = load_rows(state + state_at + d * V, K - d, column, V, V, BK, BV).to(dtype)
        b_out = tl.dot((b_x * w).to(dtype), b_state, b_out, input_precision=PRECISION)
    b_out *= scale
    if base is not None:
        b_out += load_rows(base + at * V, rows, column, H * V, V, BT, BV).to(ACC)
    store_rows(out + at * V, b_out, rows, column, H * V, V, BT, BV)


@triton.jit
def weigh(
    x,
    y,
    state,
    log_decay,
    around,
    d_x,
    d_log,
    totals,
    tokens,
    scale,
    TO_END: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`d_x`; of the products `<x, d_x>` what a chunk's own give its decays, `d_log`, and their sums `totals`.

    `totals` is like `around`: with TO_END decays of all later chunks get it, else those of all earlier ones. One
    program per chunk, row and head.
    """
    chunks = tl.cdiv(tokens, BT)
    n = tl.program_id(0) // chunks
    at, near = places(n, tl.program_id(0) % chunks, tokens, H, BT)
    rows = tokens - tl.program_id(0) % chunks * BT
    dtype = x.dtype.element_ty
    state_at = n.to(tl.int64) * K * V
    held = tl.zeros([BT], ACC)
    for c in range(0, K, BK):
        g = tl.zeros([BT, BK], ACC)
        for j in range(0, V, BV):
            b_y = load_rows(y + at * V, rows, j, H * V, V, BT, BV).to(dtype)
            b_state = load_rows(state + state_at + c * V, K - c, j, V, V, BK, BV).to(dtype)
            g = tl.dot(b_y, tl.trans(b_state), g, input_precision=PRECISION)
        b_x, w = load_weighted(x, log_decay, around, at, near, rows, c, TO_END, H, K, BT, BK, DECAY, ACC)
        g *= w * scale
        store_rows(d_x + at * K, g, rows, c, H * K, K, BT, BK)
        g *= b_x
        if DECAY == 1:
            held += tl.sum(g, 1)
        if DECAY == 2:
            d = c + tl.arange(0, BK)
            tl.store(totals + near * K + d, tl.sum(g, 0), mask=d < K)
            g = sum_rows_before(g, BT, BK) if TO_END else tl.cumsum(g, 0, reverse=True)
            store_rows(d_log + at * K, g, rows, c, H * K, K, BT, BK)
    if DECAY == 1:
        i = tl.arange(0, BT)
        tl.store(totals + near, tl.sum(held, 0))
        held = sum_before(held, BT) if TO_END else tl.cumsum(held, 0, reverse=True)
        tl.store(d_log + at + i * H, held, mask=i < rows)
