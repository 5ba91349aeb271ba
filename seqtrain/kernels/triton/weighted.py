"""Products of tokens and a state, each token decayed up to one end of a segment: what sharding a sequence takes.

With `w` the decay of a token up to the segment's end (TO_END: without its own), or from its start (with its own):

    gather:  S = scale sum_t (w_t x_t)^T y_t            spread:  out_t = base_t + scale (w_t x_t) S
    weigh:   d_x_t = scale w_t (y_t S^T)                and what <x_t, d_x_t> gives the log decays in w

`gather` of keys and values is the update of linear attention, and its gradient is `spread` and `weigh`; `spread` of
queries is what they read in an incoming state, and its gradient is `gather` and `weigh`. No chunk waits for another:
`around` is the sum of the log2 decays between a chunk and that end of the segment, computed beforehand.

Tensors and M are as in `matrix`, each row one document; `around` is `[B, chunks, H]`, or `[B, chunks, H, K]` with
per-channel decay.
"""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import (
    LOG2_E,
    load_numbers,
    load_rows,
    load_tokens,
    store_rows,
    store_tokens,
    sum_before,
    sum_rows_before,
)


@triton.jit
def places(n, c, tokens, M: tl.constexpr):
    """Where chunk c of row and head n of [B, H] begins in tensors of tokens, and where it stands in those of chunks."""
    b = (n // M.H).to(tl.int64)
    return (b * tokens + c * M.BT) * M.H + n % M.H, (b * tl.cdiv(tokens, M.BT) + c) * M.H + n % M.H


@triton.jit
def load_weighted(x, log_decay, around, at, near, rows, column, M: tl.constexpr):
    """A block of K of `(x, w)`, `[BT,BK]` and, by DECAY, `[1,1]`, `[BT,1]` or `[BT,BK]`; ACC."""
    b_x = load_tokens(x, at, rows, column, M.K, M.BK, M).to(M.ACC)
    # Up to the end, the decays of a token are those after it.
    ahead = 1 if M.TO_END else 0
    count = tl.minimum(rows, M.BT) - ahead
    if M.DECAY == 0:
        w = tl.full([1, 1], 1.0, M.ACC)
    elif M.DECAY == 1:
        log = load_numbers(log_decay + at + ahead * M.H, count, M.H, M.BT, M.ACC)
        w = tl.math.exp2(tl.cumsum(log, 0, reverse=M.TO_END) * LOG2_E + tl.load(around + near))[:, None]
    else:
        d = column + tl.arange(0, M.BK)
        log = load_tokens(log_decay, at + ahead * M.H, count, column, M.K, M.BK, M).to(M.ACC)
        far = tl.load(around + near * M.K + d, mask=d < M.K, other=0.0)
        w = tl.math.exp2(tl.cumsum(log, 0, reverse=M.TO_END) * LOG2_E + far[None, :])
    return b_x, w


@triton.jit
def gather(x, y, log_decay, around, out, tokens, slabs, scale, M: tl.constexpr):
    """S of each slab of a row's chunks, `[slabs, B, H, K, V]`. One program per slab, row, head, block of K and of V."""
    K_BLOCKS: tl.constexpr = (M.K + M.BK - 1) // M.BK
    V_BLOCKS: tl.constexpr = (M.V + M.BV - 1) // M.BV
    block = tl.program_id(0) % (K_BLOCKS * V_BLOCKS)
    row = block // V_BLOCKS * M.BK
    column = block % V_BLOCKS * M.BV
    n = tl.program_id(0) // (K_BLOCKS * V_BLOCKS)  # of [slabs, B, H]
    heads = tl.num_programs(0) // (K_BLOCKS * V_BLOCKS * slabs)  # of all rows
    chunks = tl.cdiv(tokens, M.BT)
    each = tl.cdiv(chunks, slabs)
    first = n // heads * each
    dtype = x.dtype.element_ty
    state = tl.zeros([M.BK, M.BV], M.ACC)
    for c in range(first, tl.minimum(first + each, chunks)):
        at, near = places(n % heads, c, tokens, M)
        rows = tokens - c * M.BT
        b_x, w = load_weighted(x, log_decay, around, at, near, rows, row, M)
        b_y = load_tokens(y, at, rows, column, M.V, M.BV, M).to(dtype)
        state = tl.dot(tl.trans((b_x * w).to(dtype)), b_y, state, input_precision=M.PRECISION)
    store_rows(out + (n.to(tl.int64) * M.K + row) * M.V, state * scale, M.K - row, column, M.V, M.V, M.BK, M.BV)


@triton.jit
def spread(x, state, base, log_decay, around, out, tokens, scale, M: tl.constexpr):
    """`out`, without `base` where it is None. One program per chunk, row, head and block of V."""
    BLOCKS: tl.constexpr = (M.V + M.BV - 1) // M.BV
    column = tl.program_id(0) % BLOCKS * M.BV
    chunks = tl.cdiv(tokens, M.BT)
    n = tl.program_id(0) // BLOCKS // chunks  # of [B, H]
    c = tl.program_id(0) // BLOCKS % chunks
    at, near = places(n, c, tokens, M)
    rows = tokens - c * M.BT
    dtype = x.dtype.element_ty
    state_at = n.to(tl.int64) * M.K * M.V
    b_out = tl.zeros([M.BT, M.BV], M.ACC)
    for d in range(0, M.K, M.BK):
        b_x, w = load_weighted(x, log_decay, around, at, near, rows, d, M)
        b_state = load_rows(state + state_at + d * M.V, M.K - d, column, M.V, M.V, M.BK, M.BV).to(dtype)
        b_out = tl.dot((b_x * w).to(dtype), b_state, b_out, input_precision=M.PRECISION)
    b_out *= scale
    if base is not None:
        b_out += load_tokens(base, at, rows, column, M.V, M.BV, M).to(M.ACC)
    store_tokens(out, b_out, at, rows, column, M.V, M.BV, M)


@triton.jit
def weigh(x, y, state, log_decay, around, d_x, d_log, totals, tokens, scale, M: tl.constexpr):
    """`d_x`; of the products `<x, d_x>` what a chunk's own give its decays, `d_log`, and their sums `totals`.

    `totals` is like `around`: with TO_END decays of all later chunks get it, else those of all earlier ones. One
    program per chunk, row and head.
    """
    chunks = tl.cdiv(tokens, M.BT)
    n = tl.program_id(0) // chunks
    at, near = places(n, tl.program_id(0) % chunks, tokens, M)
    rows = tokens - tl.program_id(0) % chunks * M.BT
    dtype = x.dtype.element_ty
    state_at = n.to(tl.int64) * M.K * M.V
    held = tl.zeros([M.BT], M.ACC)
    for c in range(0, M.K, M.BK):
        g = tl.zeros([M.BT, M.BK], M.ACC)
        for j in range(0, M.V, M.BV):
            b_y = load_tokens(y, at, rows, j, M.V, M.BV, M).to(dtype)
            b_state = load_rows(state + state_at + c * M.V, M.K - c, j, M.V, M.V, M.BK, M.BV).to(dtype)
            g = tl.dot(b_y, tl.trans(b_state), g, input_precision=M.PRECISION)
        b_x, w = load_weighted(x, log_decay, around, at, near, rows, c, M)
        g *= w * scale
        store_tokens(d_x, g, at, rows, c, M.K, M.BK, M)
        g *= b_x
        if M.DECAY == 1:
            held += tl.sum(g, 1)
        if M.DECAY == 2:
            d = c + tl.arange(0, M.BK)
            tl.store(totals + near * M.K + d, tl.sum(g, 0), mask=d < M.K)
            g = sum_rows_before(g, M.BT, M.BK) if M.TO_END else tl.cumsum(g, 0, reverse=True)
            store_tokens(d_log, g, at, rows, c, M.K, M.BK, M)
    if M.DECAY == 1:
        i = tl.arange(0, M.BT)
        tl.store(totals + near, tl.sum(held, 0))
        held = sum_before(held, M.BT) if M.TO_END else tl.cumsum(held, 0, reverse=True)
        tl.store(d_log + at + i * M.H, held, mask=i < rows)
