"""The recurrences with a matrix state: one family of kernels for linear attention and the delta rule.

Here are those that go from chunk to chunk, and `step`; in `matrix_chunks` those of which a program has one chunk. Flags
choose decay {none, scalar, per channel} x {additive, delta}; `recurrence` launches them all. With `G` the running sum
of log2 decays inside a chunk of C tokens, `S` the state before it, `D_ij = 2^(G_i - G_j)` for `i >= j`:

    P_ij = scale (q_i D_ij) . k_j   for i >= j          N_ij = (k_i D_ij) . k_j   for i > j
    E = (I + N diag(beta))^-1 (V - (2^G k) S)           n = beta E;  additive: n = v
    out = scale (2^G q) S + P n                         S' = 2^(G_C) S + (2^(G_C - G) k)^T n

`beta` multiplies the columns of N, so that nothing is ever divided by it: 0 and 2 are like any other number. Backward,
with `dS` the gradient of the state after the chunk and `A` the inverse above:

    dn = P^T dout + (2^(G_C - G) k) dS                  dv = A^T (beta dn);  additive: dv = dn
    dS <- 2^(G_C) dS + scale (2^G q)^T dout - (2^G k)^T dv
    dP = dout E^T, i >= j                               X = -dv E^T, i > j: all that reaches k through the inverse
    dq = scale 2^G dout S^T + dP (beta k)               y = 2^(G_C - G) E dS^T + dP^T q + X^T k
    dk = beta y - 2^G dv S^T + X (beta k)               dbeta = <y, k>

with the decay of P and N inside their products. A product of two gradients' rows, `<q_i, dq_i>`, less that of its
columns is what its decays get; a token's product with itself holds no decay and is left out, and sums that would end
in a difference are taken over just the terms that belong to them: strong decays have tiny gradients.

Only differences of G that are at most 0 are exponentiated, except for per-channel decay, which does not factor out of
the products: where a chunk's decays are mild (`chunks.is_mild`) one factor grows from its middle on as the other
shrinks. Elsewhere products are found by halving: blocks of 1, 2, 4 ... tokens, the right one's rows decayed from the
boundary, the left one's to it (`chunks.merge_blocks`), which makes each level one matrix product.

Tensors are contiguous: rows of tokens `[tokens, H, width]` (q, k and what is like them K wide, v and its like V wide, C
wide what pairs tokens of a chunk), numbers `[tokens, H]`, states `[chunks or documents, H, K, V]`. `chunks`: int32
`[chunks, 5]`, of `gpu.pieces`. `documents`: int32 `[N, 3]`, first token, tokens, first chunk.
Constexprs: BT tokens a chunk; BK, BV the widths of blocks of K and V, powers of two; PARTS, in which a state is held
(`state`); DECAY 0 none, 1 per token, 2 per channel; ACC the dtype of sums and states; PRECISION of products of
float32. An absent tensor is None. `beta` given makes a kernel the delta rule's.

With per-token decay, `sums` `[tokens, H]`, float64, holds G: the first kernel computes it, the others read it.

With per-channel decay, `prepare` writes the operands that others multiply with, already decayed: `q` is then scale
2^G q, `k` is 2^(G_C - G) k, `asked` is 2^G k, `pairs` is P, and `factors` `[chunks, H, K]` is 2^(G_C).
"""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import (
    LOG2_E,
    between,
    load_numbers,
    load_rows,
    load_sums,
    scalar_decays,
    store_rows,
    sum_decays,
)
from seqtrain.kernels.triton.state import decay_state, load_state, read_parts, store_state, write_state


@triton.jit
def load_apart(
    v,
    beta,
    log_decay,
    sums,
    factors,
    at,
    state_at,
    rows,
    column,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
):
    """What a chunk needs that no product takes as it is: `(v, beta, G or decays, G_C)`, `[1]` for what is not given."""
    b_v, strength, g, total = tl.zeros([1], ACC), tl.zeros([1], ACC), tl.zeros([1], ACC), tl.zeros([1], ACC)
    if v is not None:
        b_v = load_rows(v + at * V, rows, column, H * V, V, BT, BV)
    if beta is not None:
        strength = load_numbers(beta + at, rows, H, BT, ACC)
    if DECAY == 1:
        if log_decay is None:
            g, total = load_sums(sums + at, rows, H, BT)
        else:
            g = load_numbers(log_decay + at, rows, H, BT, tl.float64)
    if DECAY == 2:
        d = tl.arange(0, BK // PARTS)
        total = tl.tuple(())
        for p in tl.static_range(PARTS):
            part = p * (BK // PARTS) + d
            total += (tl.load(factors + state_at * K + part, mask=(part < K) & (rows > 0), other=1.0),)
    return b_v, strength, g, total


@triton.jit
def is_wide(keys, BK: tl.constexpr):
    """Whether a token's BK keys, of the dtype of `keys`, are so many bytes that what holds them whole spills."""
    return BK * keys.dtype.element_ty.primitive_bitwidth > 2048


@triton.jit
def pair_products(
    left,
    right,
    left_at,
    right_at,
    rows,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of the rows of two tiles, which lie at `left_at` and `right_at`: `[BT,BT]`."""
    if is_wide(left_at, BK):
        # Read again, 128 bytes per token at a time. Addresses computed before the loop would hold registers, too.
        PART: tl.constexpr = 1024 // left.dtype.primitive_bitwidth
        products = tl.zeros([BT, BT], ACC)
        for c in tl.range(0, K, PART, disable_licm=True):
            b_left = load_rows(left_at, rows, c, H * K, K, BT, PART)
            b_right = load_rows(right_at, rows, c, H * K, K, BT, PART)
            products = tl.dot(b_left, tl.trans(b_right), products, input_precision=PRECISION)
    else:
        products = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    return products


@triton.jit
def forward(
    q,
    k,
    v,
    beta,
    log_decay,
    sums,
    inverse,
    asked,
    pairs,
    factors,
    out,
    errors,
    states,
    initial,
    final,
    documents,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From chunk to chunk: writes those of `out`, `errors` (E), `states` (before each chunk), `final` that are given.

    One program per block of V, head and document. `log_decay` given, `sums` are found and written, else they are read.
    AHEAD: what is no operand of a product is loaded a chunk ahead (1) or where it is used (0).
    """
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % BLOCKS * BV
    nh = tl.program_id(0) // BLOCKS
    n = nh // H
    h = nh % H
    start = tl.load(documents + 3 * n).to(tl.int64)
    length = tl.load(documents + 3 * n + 1)
    chunk = tl.load(documents + 3 * n + 2).to(tl.int64)
    state = load_state(initial + nh.to(tl.int64) * K * V, column, K, V, BK, BV, PARTS, ACC)
    at = start * H + h
    if AHEAD:
        b_v, b_beta, b_g, b_total = load_apart(
            v, beta, log_decay, sums, factors, at, chunk * H + h, length, column, H, K, V, BT, BK, BV, PARTS, DECAY, ACC
        )
    for c in tl.range(tl.cdiv(length, BT), disable_licm=is_wide(k, BK)):
        rows = length - c * BT
        at = (start + c * BT) * H + h
        b_k = load_rows(k + at * K, rows, 0, H * K, K, BT, BK)
        dtype = b_k.dtype
        b_state = state[0].to(dtype)
        if states is not None:
            store_state(states + ((chunk + c) * H + h) * K * V, state, column, K, V, BK, BV, PARTS)
        # Parts are read before anything else is held.
        if PARTS > 1 and beta is not None:
            asking, reads = k if DECAY < 2 else asked, None if out is None else q + at * K
            held, b_out = read_parts(asking + at * K, reads, rows, state, H, K, BT, BK, BV, PARTS, PRECISION)
        elif PARTS > 1 and out is not None:
            b_out, _ = read_parts(q + at * K, None, rows, state, H, K, BT, BK, BV, PARTS, PRECISION)
        if AHEAD:
            written, strength, g, total = b_v.to(ACC), b_beta, b_g, b_total
        b_v, b_beta, b_g, b_total = load_apart(
            v, beta, log_decay, sums, factors, at + AHEAD * BT * H, (chunk + c + AHEAD) * H + h, rows - AHEAD * BT,
            column, H, K, V, BT, BK, BV, PARTS, DECAY, ACC,
        )  # fmt: skip
        if not AHEAD:
            written, strength, g, total = b_v.to(ACC), b_beta, b_g, b_total
        if DECAY == 1:
            if log_decay is not None:
                g, total = sum_decays(g)
                i = tl.arange(0, BT)
                tl.store(sums + at + i * H, g, mask=(i < rows) & (column == 0))
            from_start, to_end, factor, high, low = scalar_decays(g, total, ACC)
        if DECAY == 2:
            factor = total
        if beta is not None:
            if PARTS == 1 and DECAY == 2:
                b_asked = load_rows(asked + at * K, rows, 0, H * K, K, BT, BK)
                held = tl.dot(b_asked, b_state, input_precision=PRECISION)
            elif PARTS == 1:
                held = tl.dot(b_k, b_state, input_precision=PRECISION)
            if DECAY == 1:
                held *= from_start[:, None]
            b_inverse = load_rows(inverse + at * BT, rows, 0, H * BT, BT, BT, BT)
            written = tl.dot(b_inverse, (written - held).to(dtype), input_precision=PRECISION)
            if errors is not None:
                store_rows(errors + at * V, written, rows, column, H * V, V, BT, BV)
            written *= strength[:, None]
        if out is not None:
            b_q = load_rows(q + at * K, rows, 0, H * K, K, BT, BK)
            if PARTS == 1:
                b_out = tl.dot(b_q, b_state, input_precision=PRECISION)
            if DECAY == 2:
                b_pairs = load_rows(pairs + at * BT, rows, 0, H * BT, BT, BT, BT)
                b_out = tl.dot(b_pairs, written.to(dtype), b_out, input_precision=PRECISION)
            else:
                p = pair_products(b_q, b_k, q + at * K, k + at * K, rows, H, K, BT, BK, ACC, PRECISION)
                if DECAY == 1:
                    b_out *= from_start[:, None]
                    p *= between(high, low, BT, False, FINE)
                else:
                    i = tl.arange(0, BT)
                    p = tl.where(i[:, None] >= i[None, :], p, 0.0)
                b_out = tl.dot(p.to(dtype), written.to(dtype), b_out, input_precision=PRECISION) * scale
            store_rows(out + at * V, b_out, rows, column, H * V, V, BT, BV)
        if DECAY > 0:
            state = decay_state(state, factor, PARTS, DECAY)
        if DECAY == 1:
            written *= to_end[:, None]
        state = write_state(b_k, k + at * K, rows, written.to(dtype), state, H, K, BT, BK, PARTS, PRECISION)
    if final is not None:
        store_state(final + nh.to(tl.int64) * K * V, state, column, K, V, BK, BV, PARTS)


@triton.jit
def step(
    q,
    k,
    v,
    beta,
    log_decay,
    out,
    initial,
    final,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
):
    """One token per row, as in the definition: `out` and `final`, each state read and written once.

    A program a block of V, head and row.
    """
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % BLOCKS * BV
    at = (tl.program_id(0) // BLOCKS).to(tl.int64)
    d = tl.arange(0, BK)
    e = column + tl.arange(0, BV)
    b_k = tl.load(k + at * K + d, mask=d < K, other=0.0).to(ACC)
    b_q = tl.load(q + at * K + d, mask=d < K, other=0.0).to(ACC)
    written = tl.load(v + at * V + e, mask=e < V, other=0.0).to(ACC)
    state = load_rows(initial + at * K * V, K, column, V, V, BK, BV).to(ACC)
    if DECAY == 1:
        state *= tl.math.exp2(tl.load(log_decay + at).to(ACC) * LOG2_E)
    if DECAY == 2:
        decay = tl.load(log_decay + at * K + d, mask=d < K, other=0.0).to(ACC)
        state *= tl.math.exp2(decay * LOG2_E)[:, None]
    if beta is not None:
        written = (written - tl.sum(b_k[:, None] * state, 0)) * tl.load(beta + at).to(ACC)
    state += b_k[:, None] * written[None, :]
    b_out = tl.sum(b_q[:, None] * state, 0) * scale
    tl.store(out + at * V + e, b_out.to(out.dtype.element_ty), mask=e < V)
    store_rows(final + at * K * V, state, K, column, V, V, BK, BV)


@triton.jit
def reverse(
    q,
    k,
    beta,
    sums,
    inverse,
    asked,
    pairs,
    factors,
    d_out,
    d_v,
    d_states,
    d_final,
    d_initial,
    documents,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last chunk to the first: `d_v`, `d_states` (of the state after each chunk) and `d_initial`.

    One program per block of V, head and document. AHEAD: as in `forward`.
    """
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    column = tl.program_id(0) % BLOCKS * BV
    nh = tl.program_id(0) // BLOCKS
    n = nh // H
    h = nh % H
    start = tl.load(documents + 3 * n).to(tl.int64)
    length = tl.load(documents + 3 * n + 1)
    chunk = tl.load(documents + 3 * n + 2).to(tl.int64)
    i = tl.arange(0, BT)
    d_state = load_state(d_final + nh.to(tl.int64) * K * V, column, K, V, BK, BV, PARTS, ACC)
    count = tl.cdiv(length, BT)
    if AHEAD:
        rows = tl.where(count > 0, length - (count - 1) * BT, 0)
        _, b_beta, b_g, b_total = load_apart(
            None, beta, None, sums, factors, (start + (count - 1) * BT) * H + h, (chunk + count - 1) * H + h, rows, 0,
            H, K, V, BT, BK, BV, PARTS, DECAY, ACC,
        )  # fmt: skip
    for left in tl.range(count, disable_licm=is_wide(k, BK)):
        c = count - 1 - left
        rows = length - c * BT
        at = (start + c * BT) * H + h
        if PARTS > 1:
            # Before anything else is held, as in `forward`.
            store_state(d_states + ((chunk + c) * H + h) * K * V, d_state, column, K, V, BK, BV, PARTS)
            written, _ = read_parts(k + at * K, None, rows, d_state, H, K, BT, BK, BV, PARTS, PRECISION)
        if AHEAD:
            strength, g, total = b_beta, b_g, b_total
        ahead = tl.where(c > 0, BT, 0) if AHEAD else rows
        _, b_beta, b_g, b_total = load_apart(
            None, beta, None, sums, factors, at - AHEAD * BT * H, (chunk + c - AHEAD) * H + h, ahead, 0,
            H, K, V, BT, BK, BV, PARTS, DECAY, ACC,
        )  # fmt: skip
        if not AHEAD:
            strength, g, total = b_beta, b_g, b_total
        b_k = load_rows(k + at * K, rows, 0, H * K, K, BT, BK)
        b_q = load_rows(q + at * K, rows, 0, H * K, K, BT, BK)
        dtype = b_k.dtype
        b_out = load_rows(d_out + at * V, rows, column, H * V, V, BT, BV).to(dtype)
        if PARTS == 1:
            store_state(d_states + ((chunk + c) * H + h) * K * V, d_state, column, K, V, BK, BV, PARTS)
            written = tl.dot(b_k, d_state[0].to(dtype), input_precision=PRECISION)  # dn
        if DECAY == 2:
            b_pairs = load_rows(pairs + at * BT, rows, 0, H * BT, BT, BT, BT)
            written = tl.dot(tl.trans(b_pairs), b_out, written, input_precision=PRECISION)
            d_state = decay_state(d_state, total, PARTS, DECAY)
        else:
            # Its row j holds what reads token j.
            p = pair_products(b_k, b_q, k + at * K, q + at * K, rows, H, K, BT, BK, ACC, PRECISION)
            if DECAY == 1:
                from_start, to_end, factor, high, low = scalar_decays(g, total, ACC)
                written *= to_end[:, None]
                p *= between(high, low, BT, True, FINE)
                d_state = decay_state(d_state, factor, PARTS, DECAY)
            else:
                p = tl.where(i[:, None] <= i[None, :], p, 0.0)
            written = tl.dot((p * scale).to(dtype), b_out, written, input_precision=PRECISION)
            if DECAY == 1:
                b_out = (b_out.to(ACC) * (from_start * scale)[:, None]).to(dtype)
            else:
                b_out = (b_out.to(ACC) * scale).to(dtype)
        if beta is not None:
            written *= strength[:, None]
            b_inverse = load_rows(inverse + at * BT, rows, 0, H * BT, BT, BT, BT)
            written = tl.dot(tl.trans(b_inverse), written.to(dtype), input_precision=PRECISION)
        store_rows(d_v + at * V, written, rows, column, H * V, V, BT, BV)
        d_state = write_state(b_q, q + at * K, rows, b_out, d_state, H, K, BT, BK, PARTS, PRECISION)
        if beta is not None:
            if DECAY == 1:
                written *= from_start[:, None]
            asking = k if DECAY < 2 else asked
            if DECAY == 2:
                b_k = load_rows(asked + at * K, rows, 0, H * K, K, BT, BK)
            written = (-written).to(dtype)
            d_state = write_state(b_k, asking + at * K, rows, written, d_state, H, K, BT, BK, PARTS, PRECISION)
    store_state(d_initial + nh.to(tl.int64) * K * V, d_state, column, K, V, BK, BV, PARTS)
