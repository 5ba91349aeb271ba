"""The recurrences with a matrix state: one family of kernels for linear attention and the delta rule.

Flags of a kernel choose decay {none, scalar, per channel} x {additive, delta}; `recurrence` launches them. With `G` the
running sum of log2 decays inside a chunk of C tokens, `S` the state before it, `D_ij = 2^(G_i - G_j)` for `i >= j`:

    P_ij = scale (q_i D_ij) . k_j   for i >= j          N_ij = (k_i D_ij) . k_j   for i > j
    E = (I + N diag(beta))^-1 (V - (2^G k) S)           n = beta E;  additive: n = v
    out = scale (2^G q) S + P n                         S' = 2^(G_C) S + (2^(G_C - G) k)^T n

`beta` stands on the columns of N, so that nothing is ever divided by it: 0 and 2 are numbers like any other. Backward,
with `dS` the gradient of the state after the chunk and `A` the inverse above:

    dn = P^T dout + (2^(G_C - G) k) dS                  dv = A^T (beta dn);  additive: dv = dn
    dS <- 2^(G_C) dS + scale (2^G q)^T dout - (2^G k)^T dv
    dP = dout E^T, i >= j                               X = -dv E^T, i > j: all that reaches k through the inverse
    dq = scale 2^G dout S^T + dP (beta k)               y = 2^(G_C - G) E dS^T + dP^T q + X^T k
    dk = beta y - 2^G dv S^T + X (beta k)               dbeta = <y, k>

with the decay of P and N inside their products. A product of two gradients' rows, `<q_i, dq_i>`, less that of its
columns is what its decays get; a token's product with itself holds no decay and is left out, and sums that would end
in a difference are taken over just the terms that belong to them: strong decays have tiny gradients.

Only differences of G that are at most 0 are exponentiated. A decay per channel does not factor out of the products, so
they are found by halving: blocks of 1, 2, 4 ... tokens, the right one's rows decayed from the border, the left one's to
it (`chunks.merge_blocks`), which makes each level one matrix product.

Tensors are contiguous: rows of tokens `[tokens, H, width]` (q, k and what is like them K wide, v and its like V wide, C
wide what pairs tokens of a chunk), numbers `[tokens, H]`, states `[chunks or documents, H, K, V]`. `chunks`: int32
`[chunks, 5]`, of `gpu.pieces`. `documents`: int32 `[N, 3]`, first token, tokens, first chunk.
Constexprs: BT tokens a chunk; BK, BV the widths of blocks of K and V, powers of two; DECAY 0 none, 1 one a token, 2 one
a channel; ACC the dtype of sums and states; PRECISION of products of float32. An absent tensor is None. `beta` given
makes a kernel the delta rule's.

With a decay a token, `sums` `[tokens, H]`, float64, is G of each: the first kernel finds it, the others read it.

With a decay per channel, `prepare` writes the operands that others multiply with, already decayed: `q` is then scale
2^G q, `k` is 2^(G_C - G) k, `asked` is 2^G k, `pairs` is P, and `factors` `[chunks, H, K]` is 2^(G_C).
"""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import (
    LOG2_E,
    between,
    border_decays,
    centred_decays,
    in_parts,
    invert,
    is_mild,
    is_pair,
    load_numbers,
    load_rows,
    load_sums,
    merge_blocks,
    scalar_decays,
    store_rows,
    sum_before,
    sum_decays,
    sum_rows_before,
)


@triton.jit
def prepare(
    q,
    k,
    beta,
    log_decay,
    sums,
    inverse,
    decayed_q,
    decayed_k,
    asked,
    pairs,
    factors,
    chunks,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What needs no state: of the delta rule `inverse` and `sums`; with a decay per channel, P and decayed operands.

    A program a chunk and head. Additive with less than a decay per channel, nothing needs preparing.
    """
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    token = tl.load(chunks + 5 * n + 1)
    rows = tl.load(chunks + 5 * n + 2) - token
    at = token.to(tl.int64) * H + h
    i = tl.arange(0, BT)
    state_at = n.to(tl.int64) * H + h
    LEVELS: tl.constexpr = BT.bit_length() - 1
    FEW: tl.constexpr = BK if FINE else 16
    p = tl.zeros([BT, BT], ACC)  # without scale
    below = tl.zeros([BT, BT], ACC)  # N
    for c in range(0, K, BK):
        b_k = load_rows(k + at * K, rows, c, H * K, K, BT, BK)
        if DECAY < 2:
            below = tl.dot(b_k, tl.trans(b_k), below, input_precision=PRECISION)
        else:
            decays = load_rows(log_decay + at * K, rows, c, H * K, K, BT, BK).to(ACC) * LOG2_E
            if is_mild(decays, k, BT):
                b_q = load_rows(q + at * K, rows, c, H * K, K, BT, BK)
                grown, shrunk, first, second = centred_decays(decays, BT)
                right = tl.trans((b_k * shrunk).to(b_k.dtype))
                p = tl.dot((b_q * grown).to(b_k.dtype), right, p, input_precision=PRECISION)
                if inverse is not None:
                    below = tl.dot((b_k * grown).to(b_k.dtype), right, below, input_precision=PRECISION)
                store_decayed(
                    b_q, b_k, grown * first, shrunk * second, decayed_q, decayed_k, asked, factors, at, state_at, rows,
                    c, scale, H, K, BT, BK,
                )  # fmt: skip
            else:
                for few in tl.range(c, min(c + BK, K), FEW, disable_licm=True):
                    b_q = load_rows(q + at * K, rows, few, H * K, K, BT, FEW).to(ACC)
                    w_k = load_rows(k + at * K, rows, few, H * K, K, BT, FEW).to(ACC)
                    from_start = load_rows(log_decay + at * K, rows, few, H * K, K, BT, FEW).to(ACC) * LOG2_E
                    to_end = tl.zeros([BT, FEW], ACC)
                    p += tl.where(i[:, None] == i[None, :], tl.sum(b_q * w_k, 1)[:, None], 0.0)
                    for level in tl.range(LEVELS, disable_licm=True):
                        size = 1 << level
                        pair = is_pair(size, BT)
                        grown, shrunk = border_decays(from_start, to_end, size, BT)
                        right = tl.trans((w_k * shrunk).to(b_k.dtype))
                        left = (b_q * grown).to(b_k.dtype)
                        p += tl.where(pair, tl.dot(left, right, input_precision=PRECISION), 0.0)
                        if inverse is not None:
                            left = (w_k * grown).to(b_k.dtype)
                            below += tl.where(pair, tl.dot(left, right, input_precision=PRECISION), 0.0)
                        from_start, to_end = merge_blocks(from_start, to_end, size, BT, FEW)
                    store_decayed(
                        b_q, w_k, tl.math.exp2(from_start), tl.math.exp2(to_end), decayed_q, decayed_k, asked, factors,
                        at, state_at, rows, few, scale, H, K, BT, FEW,
                    )  # fmt: skip
    if DECAY == 2:
        # What stands above the diagonal may be infinite.
        p = tl.where(i[:, None] >= i[None, :], p, 0.0)
        store_rows(pairs + at * BT, p * scale, rows, 0, H * BT, BT, BT, BT)
    if inverse is not None:
        if DECAY == 1:
            g, _ = sum_decays(load_numbers(log_decay + at, rows, H, BT, tl.float64))
            tl.store(sums + at + i * H, g, mask=i < rows)
            high, low = in_parts(g, ACC)
            below *= between(high, low, BT, False, FINE)
        below *= load_numbers(beta + at, rows, H, BT, ACC)[None, :]
        below = tl.where(i[:, None] > i[None, :], below, 0.0)
        store_rows(inverse + at * BT, invert(below, BT, PRECISION), rows, 0, H * BT, BT, BT, BT)


@triton.jit
def store_decayed(
    b_q,
    b_k,
    before,
    after,
    decayed_q,
    decayed_k,
    asked,
    factors,
    at,
    state_at,
    rows,
    column,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Writes a block of K of what `prepare` decays, by 2^G (`before`) and 2^(G_C - G) (`after`), and 2^(G_C)."""
    i = tl.arange(0, BT)
    d = column + tl.arange(0, BK)
    store_rows(decayed_q + at * K, b_q * before * scale, rows, column, H * K, K, BT, BK)
    store_rows(decayed_k + at * K, b_k * after, rows, column, H * K, K, BT, BK)
    if asked is not None:
        store_rows(asked + at * K, b_k * before, rows, column, H * K, K, BT, BK)
    total = tl.sum(tl.where(i[:, None] == BT - 1, before, 0.0), 0)
    tl.store(factors + state_at * K + d, total, mask=d < K)


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
        d = tl.arange(0, BK)
        total = tl.load(factors + state_at * K + d, mask=(d < K) & (rows > 0), other=1.0)
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
        # Read again, 128 bytes a token at a time. Addresses found before the loop would hold registers, too.
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
    AHEAD: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From chunk to chunk: writes those of `out`, `errors` (E), `states` (before each chunk), `final` that are given.

    A program a block of V, head and document. `log_decay` given, `sums` are found and written, else they are read.
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
    state = load_rows(initial + nh.to(tl.int64) * K * V, K, column, V, V, BK, BV).to(ACC)
    at = start * H + h
    if AHEAD:
        b_v, b_beta, b_g, b_total = load_apart(
            v, beta, log_decay, sums, factors, at, chunk * H + h, length, column, H, K, V, BT, BK, BV, DECAY, ACC
        )
    for c in tl.range(tl.cdiv(length, BT), disable_licm=is_wide(k, BK)):
        rows = length - c * BT
        at = (start + c * BT) * H + h
        b_k = load_rows(k + at * K, rows, 0, H * K, K, BT, BK)
        dtype = b_k.dtype
        b_state = state.to(dtype)
        if states is not None:
            store_rows(states + ((chunk + c) * H + h) * K * V, b_state, K, column, V, V, BK, BV)
        if AHEAD:
            written, strength, g, total = b_v.to(ACC), b_beta, b_g, b_total
        b_v, b_beta, b_g, b_total = load_apart(
            v, beta, log_decay, sums, factors, at + AHEAD * BT * H, (chunk + c + AHEAD) * H + h, rows - AHEAD * BT,
            column, H, K, V, BT, BK, BV, DECAY, ACC,
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
            factor = total[:, None]
        if beta is not None:
            if DECAY == 2:
                b_asked = load_rows(asked + at * K, rows, 0, H * K, K, BT, BK)
                held = tl.dot(b_asked, b_state, input_precision=PRECISION)
            else:
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
            state *= factor
        if DECAY == 1:
            written *= to_end[:, None]
        state = tl.dot(tl.trans(b_k), written.to(dtype), state, input_precision=PRECISION)
    if final is not None:
        store_rows(final + nh.to(tl.int64) * K * V, state, K, column, V, V, BK, BV)


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
    """One token a row, as the definition has it: `out` and `final`, each state read and written once.

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
    AHEAD: tl.constexpr,
    DECAY: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the last chunk to the first: `d_v`, `d_states` (of the state after each chunk) and `d_initial`.

    A program a block of V, head and document. AHEAD: as in `forward`.
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
    d_state = load_rows(d_final + nh.to(tl.int64) * K * V, K, column, V, V, BK, BV).to(ACC)
    count = tl.cdiv(length, BT)
    if AHEAD:
        rows = tl.where(count > 0, length - (count - 1) * BT, 0)
        _, b_beta, b_g, b_total = load_apart(
            None, beta, None, sums, factors, (start + (count - 1) * BT) * H + h, (chunk + count - 1) * H + h, rows, 0,
            H, K, V, BT, BK, BV, DECAY, ACC,
        )  # fmt: skip
    for left in tl.range(count, disable_licm=is_wide(k, BK)):
        c = count - 1 - left
        rows = length - c * BT
        at = (start + c * BT) * H + h
        if AHEAD:
            strength, g, total = b_beta, b_g, b_total
        ahead = tl.where(c > 0, BT, 0) if AHEAD else rows
        _, b_beta, b_g, b_total = load_apart(
            None, beta, None, sums, factors, at - AHEAD * BT * H, (chunk + c - AHEAD) * H + h, ahead, 0,
            H, K, V, BT, BK, BV, DECAY, ACC,
        )  # fmt: skip
        if not AHEAD:
            strength, g, total = b_beta, b_g, b_total
        b_k = load_rows(k + at * K, rows, 0, H * K, K, BT, BK)
        b_q = load_rows(q + at * K, rows, 0, H * K, K, BT, BK)
        dtype = b_k.dtype
        b_out = load_rows(d_out + at * V, rows, column, H * V, V, BT, BV).to(dtype)
        b_state = d_state.to(dtype)
        store_rows(d_states + ((chunk + c) * H + h) * K * V, b_state, K, column, V, V, BK, BV)
        written = tl.dot(b_k, b_state, input_precision=PRECISION)  # dn
        if DECAY == 2:
            b_pairs = load_rows(pairs + at * BT, rows, 0, H * BT, BT, BT, BT)
            written = tl.dot(tl.trans(b_pairs), b_out, written, input_precision=PRECISION)
            d_state *= total[:, None]
        else:
            # Its row j holds what reads token j.
            p = pair_products(b_k, b_q, k + at * K, q + at * K, rows, H, K, BT, BK, ACC, PRECISION)
            if DECAY == 1:
                from_start, to_end, factor, high, low = scalar_decays(g, total, ACC)
                written *= to_end[:, None]
                p *= between(high, low, BT, True, FINE)
                d_state *= factor
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
        d_state = tl.dot(tl.trans(b_q), b_out, d_state, input_precision=PRECISION)
        if beta is not None:
            if DECAY == 1:
                written *= from_start[:, None]
            if DECAY == 2:
                b_k = load_rows(asked + at * K, rows, 0, H * K, K, BT, BK)
            d_state = tl.dot(tl.trans(b_k), (-written).to(dtype), d_state, input_precision=PRECISION)
    store_rows(d_initial + nh.to(tl.int64) * K * V, d_state, K, column, V, V, BK, BV)


@triton.jit
def gradients(
    q,
    k,
    beta,
    log_decay,
    sums,
    values,
    d_out,
    d_v,
    states,
    d_states,
    d_q,
    d_k,
    d_beta,
    d_log,
    chunks,
    scale,
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
    """Gradients of q, k, beta and log_decay, all as they were given. `values`: E, or v of the additive form.

    A program a chunk and head; it goes over blocks of K, and for each over blocks of V.
    """
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    token = tl.load(chunks + 5 * n + 1)
    rows = tl.load(chunks + 5 * n + 2) - token
    at = token.to(tl.int64) * H + h
    state_at = (n.to(tl.int64) * H + h) * K * V
    i = tl.arange(0, BT)
    dtype = k.dtype.element_ty
    p = tl.zeros([BT, BT], ACC)  # dP, without scale
    x = tl.zeros([BT, BT], ACC)  # -X
    for j in range(0, V, BV):
        b_out = load_rows(d_out + at * V, rows, j, H * V, V, BT, BV).to(dtype)
        b_values = tl.trans(load_rows(values + at * V, rows, j, H * V, V, BT, BV).to(dtype))
        p = tl.dot(b_out, b_values, p, input_precision=PRECISION)
        if beta is not None:
            b_v = load_rows(d_v + at * V, rows, j, H * V, V, BT, BV).to(dtype)
            x = tl.dot(b_v, b_values, x, input_precision=PRECISION)
    below = i[:, None] > i[None, :]
    own = tl.sum(tl.where(i[:, None] == i[None, :], p, 0.0), 1) * scale
    if DECAY == 1:
        g, total = load_sums(sums + at, rows, H, BT)
        from_start, to_end, factor, high, low = scalar_decays(g, total, ACC)
        weights = between(high, low, BT, False, FINE)
        p *= weights
        x *= weights
    b_p = tl.where(below, p * scale, 0.0).to(dtype)
    b_x = tl.where(below, -x, 0.0).to(dtype)
    strength = 1.0 + tl.zeros([BT], ACC) if beta is None else load_numbers(beta + at, rows, H, BT, ACC)
    sum_beta = tl.zeros([BT], ACC)
    FEW: tl.constexpr = BK if FINE else 16
    read = tl.zeros([BT], ACC)
    wrote = tl.zeros([BT], ACC)
    carried = tl.zeros([BK], ACC)
    # In loops, operands made of p and x before them would lie in registers all along and spill.
    if DECAY == 2:
        mild = True
        for c in range(0, K, BK):
            decays = load_rows(log_decay + at * K, rows, c, H * K, K, BT, BK).to(ACC) * LOG2_E
            mild = mild & is_mild(decays, k, BT)
        if mild:
            for c in tl.range(0, K, BK, disable_licm=True):
                sum_beta += mild_gradients(
                    q, k, log_decay, values, d_out, d_v, states, d_states, d_q, d_k, d_log, b_p, b_x, own, strength,
                    at, state_at, rows, c, scale, beta is not None, H, K, V, BT, BK, BV, ACC, PRECISION,
                )  # fmt: skip
        else:
            for c in tl.range(0, K, FEW, disable_licm=True):
                sum_beta += exact_gradients(
                    q, k, log_decay, values, d_out, d_v, states, d_states, d_q, d_k, d_log, b_p, b_x, own, strength,
                    at, state_at, rows, c, scale, beta is not None, H, K, V, BT, FEW, BV, ACC, PRECISION,
                )  # fmt: skip
    else:
        for c in tl.range(0, K, BK, disable_licm=True):
            g_q, y, g_k, through = state_products(
                d_out + at * V, values + at * V, d_v + at * V, states + state_at + c * V, d_states + state_at + c * V,
                rows, K - c, dtype, beta is not None, DECAY > 0, H, V, BT, BK, BV, ACC, PRECISION,
            )  # fmt: skip
            b_q = load_rows(q + at * K, rows, c, H * K, K, BT, BK)
            b_k = load_rows(k + at * K, rows, c, H * K, K, BT, BK)
            w_q = b_q.to(ACC)
            w_k = b_k.to(ACC)
            g_q *= scale
            if DECAY == 1:
                g_q *= from_start[:, None]
                y *= to_end[:, None]
                g_k *= from_start[:, None]
                read += tl.sum(g_q * w_q - g_k * w_k, 1)
                wrote += tl.sum(y * w_k, 1) * strength
                carried += through
            strong_k = (w_k * strength[:, None]).to(dtype)
            s_q = tl.dot(b_p, strong_k, input_precision=PRECISION)
            s_y = tl.dot(tl.trans(b_p), b_q, input_precision=PRECISION)
            if beta is not None:
                s_y = tl.dot(tl.trans(b_x), b_k, s_y, input_precision=PRECISION)
                s_k = tl.dot(b_x, strong_k, input_precision=PRECISION)
                g_k = s_k - g_k
                if DECAY == 1:
                    read += tl.sum(s_k * w_k, 1)
            if DECAY == 1:
                # Of the rounded keys, so that rows and columns are sums of the same numbers.
                read += tl.sum(s_q * w_q - s_y * strong_k.to(ACC), 1)
            sum_beta += store_gradients(
                d_q + at * K, d_k + at * K, g_q + s_q, g_k, y + s_y, w_q, w_k, own, strength, rows, c, H, K, BT, BK
            )
    if beta is not None:
        tl.store(d_beta + at + i * H, sum_beta.to(d_beta.dtype.element_ty), mask=i < rows)
    if DECAY == 1:
        b_log = tl.cumsum(read, 0, reverse=True) + sum_before(wrote, BT) + tl.sum(carried, 0) * factor
        tl.store(d_log + at + i * H, b_log.to(d_log.dtype.element_ty), mask=i < rows)


@triton.jit
def state_products(
    d_out,
    values,
    d_v,
    states,
    d_states,
    rows,
    key_rows,
    dtype: tl.constexpr,
    DELTA: tl.constexpr,
    THROUGH: tl.constexpr,
    H: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of K of `(dout S^T, values dS^T, dv S^T, <S, dS>)`, `[BT,BK]` thrice and `[BK]`: without decays."""
    g_q = tl.zeros([BT, BK], ACC)
    y = tl.zeros([BT, BK], ACC)
    g_k = tl.zeros([BT, BK], ACC)
    through = tl.zeros([BK], ACC)
    for j in range(0, V, BV):
        b_out = load_rows(d_out, rows, j, H * V, V, BT, BV).to(dtype)
        b_values = load_rows(values, rows, j, H * V, V, BT, BV).to(dtype)
        b_state = load_rows(states, key_rows, j, V, V, BK, BV)
        b_d_state = load_rows(d_states, key_rows, j, V, V, BK, BV)
        g_q = tl.dot(b_out, tl.trans(b_state), g_q, input_precision=PRECISION)
        y = tl.dot(b_values, tl.trans(b_d_state), y, input_precision=PRECISION)
        if DELTA:
            b_v = load_rows(d_v, rows, j, H * V, V, BT, BV).to(dtype)
            g_k = tl.dot(b_v, tl.trans(b_state), g_k, input_precision=PRECISION)
        if THROUGH:
            through += tl.sum(b_state.to(ACC) * b_d_state.to(ACC), 1)
    return g_q, y, g_k, through


@triton.jit
def mild_gradients(
    q,
    k,
    log_decay,
    values,
    d_out,
    d_v,
    states,
    d_states,
    d_q,
    d_k,
    d_log,
    b_p,
    b_x,
    own,
    strength,
    at,
    state_at,
    rows,
    column,
    scale,
    DELTA: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of K of `gradients` with a decay per channel where `is_mild`; returns its part of dbeta."""
    g_q, y, g_k, through = state_products(
        d_out + at * V, values + at * V, d_v + at * V, states + state_at + column * V, d_states + state_at + column * V,
        rows, K - column, b_p.dtype, DELTA, True, H, V, BT, BK, BV, ACC, PRECISION,
    )  # fmt: skip
    w_q = load_rows(q + at * K, rows, column, H * K, K, BT, BK).to(ACC)
    w_k = load_rows(k + at * K, rows, column, H * K, K, BT, BK).to(ACC)
    decays = load_rows(log_decay + at * K, rows, column, H * K, K, BT, BK).to(ACC) * LOG2_E
    grown, shrunk, first, second = centred_decays(decays, BT)
    # Rows and columns are multiplied with the same rounded operands, so that they are sums of the same numbers.
    left = (w_k * strength[:, None] * shrunk).to(b_p.dtype)
    right = (w_q * grown).to(b_p.dtype)
    y *= second
    b_log = sum_rows_before(y * left, BT, BK) + first * second * through[None, :]
    g_q = tl.dot(b_p, left, g_q * (first * scale), input_precision=PRECISION)
    t_y = tl.dot(tl.trans(b_p), right, input_precision=PRECISION)
    turned = g_q * right
    if DELTA:
        right = (w_k * grown).to(b_p.dtype)
        g_k = tl.dot(b_x, left, -first * g_k, input_precision=PRECISION)
        t_y = tl.dot(tl.trans(b_x), right, t_y, input_precision=PRECISION)
        turned += g_k * right
    b_log += tl.cumsum(turned - t_y * left, 0, reverse=True)
    store_rows(d_log + at * K, b_log, rows, column, H * K, K, BT, BK)
    return store_gradients(
        d_q + at * K, d_k + at * K, grown * g_q, grown * g_k, shrunk * (y + t_y), w_q, w_k, own, strength, rows, column,
        H, K, BT, BK,
    )  # fmt: skip


@triton.jit
def exact_gradients(
    q,
    k,
    log_decay,
    values,
    d_out,
    d_v,
    states,
    d_states,
    d_q,
    d_k,
    d_log,
    b_p,
    b_x,
    own,
    strength,
    at,
    state_at,
    rows,
    column,
    scale,
    DELTA: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `mild_gradients`, at any decays."""
    LEVELS: tl.constexpr = BT.bit_length() - 1
    i = tl.arange(0, BT)
    w_q = load_rows(q + at * K, rows, column, H * K, K, BT, BK).to(ACC)
    w_k = load_rows(k + at * K, rows, column, H * K, K, BT, BK).to(ACC)
    from_start = load_rows(log_decay + at * K, rows, column, H * K, K, BT, BK).to(ACC) * LOG2_E
    to_end = tl.zeros([BT, BK], ACC)
    s_q = tl.zeros([BT, BK], ACC)
    s_k = tl.zeros([BT, BK], ACC)
    s_y = tl.zeros([BT, BK], ACC)
    turned = tl.zeros([BT, BK], ACC)
    for level in tl.range(LEVELS, disable_licm=True):
        size = 1 << level
        pair = is_pair(size, BT)
        grown, shrunk = border_decays(from_start, to_end, size, BT)
        left = (w_k * strength[:, None] * shrunk).to(b_p.dtype)
        right = (w_q * grown).to(b_p.dtype)
        part = tl.where(pair, b_p, 0.0)
        t_q = tl.dot(part, left, input_precision=PRECISION)
        t_y = tl.dot(tl.trans(part), right, input_precision=PRECISION)
        turned += t_q * right
        s_q += t_q * grown
        if DELTA:
            right = (w_k * grown).to(b_p.dtype)
            part = tl.where(pair, b_x, 0.0)
            t_k = tl.dot(part, left, input_precision=PRECISION)
            t_y = tl.dot(tl.trans(part), right, t_y, input_precision=PRECISION)
            turned += t_k * right
            s_k += t_k * grown
        turned -= t_y * left
        s_y += t_y * shrunk
        from_start, to_end = merge_blocks(from_start, to_end, size, BT, BK)
    g_q, y, g_k, through = state_products(
        d_out + at * V, values + at * V, d_v + at * V, states + state_at + column * V, d_states + state_at + column * V,
        rows, K - column, b_p.dtype, DELTA, True, H, V, BT, BK, BV, ACC, PRECISION,
    )  # fmt: skip
    before = tl.math.exp2(from_start)
    g_q *= before * scale
    y *= tl.math.exp2(to_end)
    g_k *= before
    through *= tl.sum(tl.where(i[:, None] == BT - 1, before, 0.0), 0)
    b_log = tl.cumsum(turned + g_q * w_q - g_k * w_k, 0, reverse=True) + through[None, :]
    b_log += sum_rows_before(y * w_k * strength[:, None], BT, BK)
    store_rows(d_log + at * K, b_log, rows, column, H * K, K, BT, BK)
    return store_gradients(
        d_q + at * K, d_k + at * K, g_q + s_q, s_k - g_k, y + s_y, w_q, w_k, own, strength, rows, column, H, K, BT, BK
    )


@triton.jit
def store_gradients(
    d_q,
    d_k,
    g_q,
    g_k,
    y,
    w_q,
    w_k,
    own,
    strength,
    rows,
    column,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Writes a block of K of dq and `dk = g_k + beta y`, each token's pair with itself added; returns `<y, k>`."""
    y += own[:, None] * w_q
    store_rows(d_q, g_q + (own * strength)[:, None] * w_k, rows, column, H * K, K, BT, BK)
    store_rows(d_k, g_k + y * strength[:, None], rows, column, H * K, K, BT, BK)
    return tl.sum(y * w_k, 1)
