"""The recurrences with a matrix state: one family of kernels for linear attention and the delta rule.

Here are those that go from chunk to chunk, and `step`; in `matrix_chunks` those of which a program has one chunk. With
`G` the running sum of log2 decays inside a chunk of C tokens, `S` the state before it, `D_ij = 2^(G_i - G_j)`:

    P_ij = scale (q_i D_ij) . k_j   for i >= j          N_ij = (k_i D_ij) . k_j   for i > j
    E = (I + N diag(beta))^-1 (V - (2^G k) S)           n = beta E;  additive: n = v
    out = scale (2^G q) S + P n                         S' = 2^(G_C) S + (2^(G_C - G) k)^T n

Backward, dn is the gradient of n, X all that reaches k through the inverse: docs/kernels.md, "Algebra", has it whole.

Tensors are contiguous: rows of tokens `[tokens, H, width]` (q, k and what is like them K wide, v and its like V wide, C
wide what pairs tokens of a chunk), numbers `[tokens, H]`, states `[chunks or pieces, H, K, V]`. `chunks`: int32
`[chunks, 5]`, of `gpu.pieces`. An absent tensor is None; `beta` given makes a kernel the delta rule's.
A piece is a whole document, or of a document cut in pieces (`maps`) one of them. `pieces`: int32 `[P, 5]`, first token,
tokens, first chunk, and the document whose first and whose last piece it is, -1 for none.
M, compile-time arguments: H, K, V; BT tokens a chunk; BK, BV the widths of blocks of K and V, powers of two; PARTS, in
which a state is held (`state`); DECAY 0 none, 1 per token, 2 per channel; DELTA whether there is a beta; ACC the dtype
of sums and states; PRECISION of products of float32.

`made`: q, k, log_decay, sums, inverse, asked, pairs, factors. With per-token decay, `sums` `[tokens, H]`, float64,
holds G; where `log_decay` is given, it is to be found. With per-channel decay, `prepare` writes the operands decayed: q
is scale 2^G q, k is 2^(G_C - G) k, `asked` is 2^G k, `pairs` is P, and `factors` `[chunks, H, K]` is 2^(G_C).
"""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import (
    LOG2_E,
    between,
    load_numbers,
    load_rows,
    load_sums,
    load_tokens,
    scalar_decays,
    store_rows,
    store_tokens,
    sum_decays,
)
from seqtrain.kernels.triton.state import decay_state, load_state, read_parts, store_state, write_state


@triton.jit
def load_apart(tensors, at, state_at, rows, value_rows, column, M: tl.constexpr):
    """What a chunk needs that no product takes as it is: `(v, beta, G or decays, G_C)`, `[1]` for what is not given.

    value_rows: those of v; zeros follow.
    """
    v, beta, log_decay, sums, factors = tensors
    b_v, strength, g, total = tl.zeros([1], M.ACC), tl.zeros([1], M.ACC), tl.zeros([1], M.ACC), tl.zeros([1], M.ACC)
    if v is not None:
        b_v = load_tokens(v, at, value_rows, column, M.V, M.BV, M)
    if beta is not None:
        strength = load_numbers(beta + at, rows, M.H, M.BT, M.ACC)
    if M.DECAY == 1:
        if log_decay is None:
            g, total = load_sums(sums + at, rows, M.H, M.BT)
        else:
            g = load_numbers(log_decay + at, rows, M.H, M.BT, tl.float64)
    if M.DECAY == 2:
        PARTS: tl.constexpr = M.PARTS
        d = tl.arange(0, M.BK // PARTS)
        total = tl.tuple(())
        for p in tl.static_range(PARTS):
            part = p * (M.BK // PARTS) + d
            total += (tl.load(factors + state_at * M.K + part, mask=(part < M.K) & (rows > 0), other=1.0),)
    return b_v, strength, g, total


@triton.jit
def place(pieces, BLOCKS: tl.constexpr, M: tl.constexpr):
    """A program's block; which state it has; its head and, as a tuple, first token, tokens and first chunk of its
    piece; the document whose first, and whose last piece it is."""
    nh = tl.program_id(0) // BLOCKS
    row = pieces + 5 * (nh // M.H)
    where = nh % M.H, tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2).to(tl.int64)
    opens, closes = tl.load(row + 3).to(tl.int64), tl.load(row + 4).to(tl.int64)
    return tl.program_id(0) % BLOCKS, nh.to(tl.int64), where, opens, closes


@triton.jit
def is_wide(keys, BK: tl.constexpr):
    """Whether a token's BK keys, of the dtype of `keys`, are so many bytes that what holds them whole spills."""
    return BK * keys.dtype.element_ty.primitive_bitwidth > 2048


@triton.jit
def pair_products(left, right, left_at, right_at, rows, M: tl.constexpr):
    """Products of the rows of two tiles, which lie at `left_at` and `right_at`: `[BT,BT]`."""
    if is_wide(left_at, M.BK):
        # Read again, 128 bytes per token at a time. Addresses computed before the loop would hold registers, too.
        PART: tl.constexpr = 1024 // left.dtype.primitive_bitwidth
        products = tl.zeros([M.BT, M.BT], M.ACC)
        for c in tl.range(0, M.K, PART, disable_licm=True):
            b_left = load_rows(left_at, rows, c, M.H * M.K, M.K, M.BT, PART)
            b_right = load_rows(right_at, rows, c, M.H * M.K, M.K, M.BT, PART)
            products = tl.dot(b_left, tl.trans(b_right), products, input_precision=M.PRECISION)
    else:
        products = tl.dot(left, tl.trans(right), input_precision=M.PRECISION)
    return products


@triton.jit
def forward(made, v, beta, out, errors, states, initial, final, pieces, scale, M: tl.constexpr):
    """From chunk to chunk: writes those of `out`, `errors` (E), `states` (before each chunk), `final` that are given.

    One program per block of V, head and piece. `initial` has a state for each piece, `final` one for each document.
    `log_decay` given, `sums` are found and written, else they are read. AHEAD: what is no operand of a product is
    loaded a chunk ahead (1) or where it is used (0).
    """
    BLOCKS: tl.constexpr = (M.V + M.BV - 1) // M.BV
    block, nh, where, _, closes = place(pieces, BLOCKS, M)
    column = block * M.BV
    state = load_state(initial + nh * M.K * M.V, column, M)
    state, _ = go_forward(made, v, beta, (out, errors, states), state, column, where, where[2], scale, False, M)
    if final is not None:  # noqa: SIM102  known when compiled
        if closes >= 0:
            store_state(final + (closes * M.H + where[0]) * M.K * M.V, state, column, M)


@triton.jit
def go_forward(made, v, beta, written_to, state, column, where, values, scale, TRACK: tl.constexpr, M: tl.constexpr):
    """What `forward` does, from the state before a piece; returns the state after it.

    values: tokens whose v is read; of others it is zero. TRACK: of the additive form, the product of the piece's decays
    is returned, too, `[1]` or `[BK]` in PARTS.
    """
    q, k, log_decay, sums, inverse, asked, pairs, factors = made
    out, errors, states = written_to
    h, start, length, chunk = where
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    apart = (v, beta, log_decay, sums, factors)
    through = 1.0 + tl.zeros([1], M.ACC)
    if TRACK and M.DECAY == 2:
        through = tl.tuple(())
        PARTS: tl.constexpr = M.PARTS
        for _ in tl.static_range(PARTS):
            through += (1.0 + tl.zeros([M.BK // PARTS], M.ACC),)
    if M.AHEAD:
        b_v, b_beta, b_g, b_total = load_apart(apart, start * M.H + h, chunk * M.H + h, length, values, column, M)
    for c in tl.range(tl.cdiv(length, M.BT), disable_licm=is_wide(k, M.BK)):
        rows = length - c * M.BT
        at = (start + c * M.BT) * M.H + h
        b_k = load_tokens(k, at, rows, 0, M.K, M.BK, M)
        dtype = b_k.dtype
        b_state = state[0].to(dtype)
        if states is not None:
            store_state(states + ((chunk + c) * M.H + h) * M.K * M.V, state, column, M)
        # Parts are read before anything else is held.
        if M.PARTS > 1 and beta is not None:
            asking, reads = k if M.DECAY < 2 else asked, None if out is None else q + at * M.K
            held, b_out = read_parts(asking + at * M.K, reads, rows, state, M)
        elif M.PARTS > 1 and out is not None:
            b_out, _ = read_parts(q + at * M.K, None, rows, state, M)
        if M.AHEAD:
            written, strength, g, total = b_v.to(M.ACC), b_beta, b_g, b_total
        b_v, b_beta, b_g, b_total = load_apart(
            apart,
            at + M.AHEAD * M.BT * M.H,
            (chunk + c + M.AHEAD) * M.H + h,
            rows - M.AHEAD * M.BT,
            values - (c + M.AHEAD) * M.BT,
            column,
            M,
        )
        if not M.AHEAD:
            written, strength, g, total = b_v.to(M.ACC), b_beta, b_g, b_total
        if M.DECAY == 1:
            if log_decay is not None:
                g, total = sum_decays(g)
                i = tl.arange(0, M.BT)
                tl.store(sums + at + i * M.H, g, mask=(i < rows) & (column == 0))
            from_start, to_end, factor, high, low = scalar_decays(g, total, M.ACC)
        if M.DECAY == 2:
            factor = total
        if beta is not None:
            if M.PARTS == 1 and M.DECAY == 2:
                b_asked = load_tokens(asked, at, rows, 0, M.K, M.BK, M)
                held = tl.dot(b_asked, b_state, input_precision=M.PRECISION)
            elif M.PARTS == 1:
                held = tl.dot(b_k, b_state, input_precision=M.PRECISION)
            if M.DECAY == 1:
                held *= from_start[:, None]
            b_inverse = load_tokens(inverse, at, rows, 0, M.BT, M.BT, M)
            written = tl.dot(b_inverse, (written - held).to(dtype), input_precision=M.PRECISION)
            if errors is not None:
                store_tokens(errors, written, at, rows, column, M.V, M.BV, M)
            written *= strength[:, None]
        if out is not None:
            b_q = load_tokens(q, at, rows, 0, M.K, M.BK, M)
            if M.PARTS == 1:
                b_out = tl.dot(b_q, b_state, input_precision=M.PRECISION)
            if M.DECAY == 2:
                b_pairs = load_tokens(pairs, at, rows, 0, M.BT, M.BT, M)
                b_out = tl.dot(b_pairs, written.to(dtype), b_out, input_precision=M.PRECISION)
            else:
                p = pair_products(b_q, b_k, q + at * M.K, k + at * M.K, rows, M)
                if M.DECAY == 1:
                    b_out *= from_start[:, None]
                    p *= between(high, low, M.BT, False, FINE)
                else:
                    i = tl.arange(0, M.BT)
                    p = tl.where(i[:, None] >= i[None, :], p, 0.0)
                b_out = tl.dot(p.to(dtype), written.to(dtype), b_out, input_precision=M.PRECISION) * scale
            store_tokens(out, b_out, at, rows, column, M.V, M.BV, M)
        if M.DECAY > 0:
            state = decay_state(state, factor, M)
            if TRACK and M.DECAY == 1:
                through *= factor
            elif TRACK:
                through = multiply(through, factor, M)
        if M.DECAY == 1:
            written *= to_end[:, None]
        state = write_state(b_k, k + at * M.K, rows, written.to(dtype), state, M)
    return state, through


@triton.jit
def multiply(left, right, M: tl.constexpr):
    """Products of what lies in PARTS."""
    PARTS: tl.constexpr = M.PARTS
    found = tl.tuple(())
    for p in tl.static_range(PARTS):
        found += (left[p] * right[p],)
    return found


@triton.jit
def step(q, k, v, beta, log_decay, out, initial, final, scale, M: tl.constexpr):
    """One token per row, as in the definition: `out` and `final`, each state read and written once.

    A program a block of V, head and row.
    """
    BLOCKS: tl.constexpr = (M.V + M.BV - 1) // M.BV
    column = tl.program_id(0) % BLOCKS * M.BV
    at = (tl.program_id(0) // BLOCKS).to(tl.int64)
    d = tl.arange(0, M.BK)
    e = column + tl.arange(0, M.BV)
    b_k = tl.load(k + at * M.K + d, mask=d < M.K, other=0.0).to(M.ACC)
    b_q = tl.load(q + at * M.K + d, mask=d < M.K, other=0.0).to(M.ACC)
    written = tl.load(v + at * M.V + e, mask=e < M.V, other=0.0).to(M.ACC)
    state = load_rows(initial + at * M.K * M.V, M.K, column, M.V, M.V, M.BK, M.BV).to(M.ACC)
    if M.DECAY == 1:
        state *= tl.math.exp2(tl.load(log_decay + at).to(M.ACC) * LOG2_E)
    if M.DECAY == 2:
        decay = tl.load(log_decay + at * M.K + d, mask=d < M.K, other=0.0).to(M.ACC)
        state *= tl.math.exp2(decay * LOG2_E)[:, None]
    if beta is not None:
        written = (written - tl.sum(b_k[:, None] * state, 0)) * tl.load(beta + at).to(M.ACC)
    state += b_k[:, None] * written[None, :]
    b_out = tl.sum(b_q[:, None] * state, 0) * scale
    tl.store(out + at * M.V + e, b_out.to(out.dtype.element_ty), mask=e < M.V)
    store_rows(final + at * M.K * M.V, state, M.K, column, M.V, M.V, M.BK, M.BV)


@triton.jit
def reverse(made, beta, d_out, d_v, d_states, d_final, d_initial, pieces, scale, M: tl.constexpr):
    """From the last chunk to the first: `d_v`, `d_states` (of the state after each chunk) and `d_initial`.

    One program per block of V, head and piece. `d_final` has a gradient for each piece, `d_initial` one for each
    document. AHEAD: as in `forward`.
    """
    BLOCKS: tl.constexpr = (M.V + M.BV - 1) // M.BV
    block, nh, where, opens, _ = place(pieces, BLOCKS, M)
    column = block * M.BV
    d_state = load_state(d_final + nh * M.K * M.V, column, M)
    d_state = go_back(made, beta, (d_out, d_v, d_states), d_state, column, where, scale, M)
    if opens >= 0:
        store_state(d_initial + (opens * M.H + where[0]) * M.K * M.V, d_state, column, M)


@triton.jit
def go_back(made, beta, outputs, d_state, column, where, scale, M: tl.constexpr):
    """What `reverse` does, from the gradient of the state after a piece; returns that of the state before it.

    outputs: d_out, which is read, and d_v and d_states, each written if given.
    """
    q, k, _log_decay, sums, inverse, asked, pairs, factors = made
    d_out, d_v, d_states = outputs
    h, start, length, chunk = where
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    # The additive form's state depends on no gradient of v.
    WRITES: tl.constexpr = d_v is not None or beta is not None
    i = tl.arange(0, M.BT)
    count = tl.cdiv(length, M.BT)
    apart = (None, beta, None, sums, factors)
    if M.AHEAD:
        rows = tl.where(count > 0, length - (count - 1) * M.BT, 0)
        _, b_beta, b_g, b_total = load_apart(
            apart, (start + (count - 1) * M.BT) * M.H + h, (chunk + count - 1) * M.H + h, rows, 0, 0, M
        )
    for left in tl.range(count, disable_licm=is_wide(k, M.BK)):
        c = count - 1 - left
        rows = length - c * M.BT
        at = (start + c * M.BT) * M.H + h
        if d_states is not None:
            store_state(d_states + ((chunk + c) * M.H + h) * M.K * M.V, d_state, column, M)
        if M.PARTS > 1 and WRITES:
            # Before anything else is held, as in `forward`.
            written, _ = read_parts(k + at * M.K, None, rows, d_state, M)
        if M.AHEAD:
            strength, g, total = b_beta, b_g, b_total
        ahead = tl.where(c > 0, M.BT, 0) if M.AHEAD else rows
        _, b_beta, b_g, b_total = load_apart(
            apart, at - M.AHEAD * M.BT * M.H, (chunk + c - M.AHEAD) * M.H + h, ahead, 0, 0, M
        )
        if not M.AHEAD:
            strength, g, total = b_beta, b_g, b_total
        b_q = load_tokens(q, at, rows, 0, M.K, M.BK, M)
        dtype = b_q.dtype
        b_out = load_tokens(d_out, at, rows, column, M.V, M.BV, M).to(dtype)
        if M.DECAY == 1:
            from_start, to_end, factor, high, low = scalar_decays(g, total, M.ACC)
        if WRITES:
            b_k = load_tokens(k, at, rows, 0, M.K, M.BK, M)
            if M.PARTS == 1:
                written = tl.dot(b_k, d_state[0].to(dtype), input_precision=M.PRECISION)  # dn
            if M.DECAY == 2:
                b_pairs = load_tokens(pairs, at, rows, 0, M.BT, M.BT, M)
                written = tl.dot(tl.trans(b_pairs), b_out, written, input_precision=M.PRECISION)
            else:
                # Its row j holds what reads token j.
                p = pair_products(b_k, b_q, k + at * M.K, q + at * M.K, rows, M)
                if M.DECAY == 1:
                    written *= to_end[:, None]
                    p *= between(high, low, M.BT, True, FINE)
                else:
                    p = tl.where(i[:, None] <= i[None, :], p, 0.0)
                written = tl.dot((p * scale).to(dtype), b_out, written, input_precision=M.PRECISION)
        if M.DECAY == 1:
            d_state = decay_state(d_state, factor, M)
            b_out = (b_out.to(M.ACC) * (from_start * scale)[:, None]).to(dtype)
        elif M.DECAY == 2:
            d_state = decay_state(d_state, total, M)
        else:
            b_out = (b_out.to(M.ACC) * scale).to(dtype)
        if beta is not None:
            written *= strength[:, None]
            b_inverse = load_tokens(inverse, at, rows, 0, M.BT, M.BT, M)
            written = tl.dot(tl.trans(b_inverse), written.to(dtype), input_precision=M.PRECISION)
        if d_v is not None:
            store_tokens(d_v, written, at, rows, column, M.V, M.BV, M)
        d_state = write_state(b_q, q + at * M.K, rows, b_out, d_state, M)
        if beta is not None:
            if M.DECAY == 1:
                written *= from_start[:, None]
            asking = k if M.DECAY < 2 else asked
            if M.DECAY == 2:
                b_k = load_tokens(asked, at, rows, 0, M.K, M.BK, M)
            written = (-written).to(dtype)
            d_state = write_state(b_k, asking + at * M.K, rows, written, d_state, M)
    return d_state
