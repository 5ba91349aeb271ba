"""Kernels of the matrix recurrences of which a program has one chunk and head; algebra and tensors are `matrix`'s."""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import (
    LOG2_E,
    between,
    boundary_decays,
    centred_decays,
    in_parts,
    invert,
    is_mild,
    is_pair,
    load_numbers,
    load_rows,
    load_sums,
    load_tokens,
    merge_blocks,
    scalar_decays,
    store_tokens,
    sum_before,
    sum_decays,
    sum_rows_before,
)


@triton.jit
def place(chunks, M: tl.constexpr):
    """Where the program's chunk and head begin in `[tokens, H]`, and its number of tokens."""
    row = chunks + 5 * (tl.program_id(0) // M.H)
    token = tl.load(row + 1)
    return token.to(tl.int64) * M.H + tl.program_id(0) % M.H, tl.load(row + 2) - token


@triton.jit
def prepare(
    q, k, beta, log_decay, sums, inverse, decayed_q, decayed_k, asked, pairs, factors, chunks, scale, M: tl.constexpr
):
    """What needs no state: of the delta rule `inverse` and `sums`; with per-channel decay, P and decayed operands.

    One program per chunk and head. The additive form without per-channel decay needs no preparation.
    """
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    at, rows = place(chunks, M)
    i = tl.arange(0, M.BT)
    decayed = (decayed_q, decayed_k, asked, factors)
    # Keys per block of the exact path; more would spill.
    FEW: tl.constexpr = M.BK if FINE else 16
    p = tl.zeros([M.BT, M.BT], M.ACC)  # without scale
    below = tl.zeros([M.BT, M.BT], M.ACC)  # N
    for c in range(0, M.K, M.BK):
        b_k = load_tokens(k, at, rows, c, M.K, M.BK, M)
        if M.DECAY < 2:
            below = tl.dot(b_k, tl.trans(b_k), below, input_precision=M.PRECISION)
        else:
            decays = load_tokens(log_decay, at, rows, c, M.K, M.BK, M).to(M.ACC) * LOG2_E
            if is_mild(decays, k, M.BT):
                b_q = load_tokens(q, at, rows, c, M.K, M.BK, M)
                grown, shrunk, first, second = centred_decays(decays, M.BT)
                right = tl.trans((b_k * shrunk).to(b_k.dtype))
                p = tl.dot((b_q * grown).to(b_k.dtype), right, p, input_precision=M.PRECISION)
                if inverse is not None:
                    below = tl.dot((b_k * grown).to(b_k.dtype), right, below, input_precision=M.PRECISION)
                store_decayed(decayed, b_q, b_k, grown * first, shrunk * second, at, rows, c, scale, M.BK, M)
            else:
                for few in tl.range(c, min(c + M.BK, M.K), FEW, disable_licm=True):
                    b_q = load_tokens(q, at, rows, few, M.K, FEW, M).to(M.ACC)
                    w_k = load_tokens(k, at, rows, few, M.K, FEW, M).to(M.ACC)
                    b_log = load_tokens(log_decay, at, rows, few, M.K, FEW, M).to(M.ACC) * LOG2_E
                    p, below, before, after = add_exact_pairs(
                        p, below, b_q, w_k, b_log, b_k.dtype, inverse is not None, FEW, M
                    )
                    store_decayed(decayed, b_q, w_k, before, after, at, rows, few, scale, FEW, M)
    if M.DECAY == 2:
        # What stands above the diagonal may be infinite.
        p = tl.where(i[:, None] >= i[None, :], p, 0.0)
        store_tokens(pairs, p * scale, at, rows, 0, M.BT, M.BT, M)
    if inverse is not None:
        if M.DECAY == 1:
            g, _ = sum_decays(load_numbers(log_decay + at, rows, M.H, M.BT, tl.float64))
            tl.store(sums + at + i * M.H, g, mask=i < rows)
            high, low = in_parts(g, M.ACC)
            below *= between(high, low, M.BT, False, FINE)
        below *= load_numbers(beta + at, rows, M.H, M.BT, M.ACC)[None, :]
        below = tl.where(i[:, None] > i[None, :], below, 0.0)
        store_tokens(inverse, invert(below, M.BT, M.PRECISION), at, rows, 0, M.BT, M.BT, M)


@triton.jit
def add_exact_pairs(
    p, below, q, k, decays, dtype: tl.constexpr, DELTA: tl.constexpr, BK: tl.constexpr, M: tl.constexpr
):
    """P and, with DELTA, N of a block of K at any decays, added to `p` and `below`; with these 2^G and 2^(G_C - G)."""
    LEVELS: tl.constexpr = M.BT.bit_length() - 1
    i = tl.arange(0, M.BT)
    from_start, to_end = decays, tl.zeros([M.BT, BK], M.ACC)
    p += tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    for level in tl.range(LEVELS, disable_licm=True):
        size = 1 << level
        pair = is_pair(size, M.BT)
        grown, shrunk = boundary_decays(from_start, to_end, size, M.BT)
        right = tl.trans((k * shrunk).to(dtype))
        p += tl.where(pair, tl.dot((q * grown).to(dtype), right, input_precision=M.PRECISION), 0.0)
        if DELTA:
            below += tl.where(pair, tl.dot((k * grown).to(dtype), right, input_precision=M.PRECISION), 0.0)
        from_start, to_end = merge_blocks(from_start, to_end, size, M.BT, BK)
    return p, below, tl.math.exp2(from_start), tl.math.exp2(to_end)


@triton.jit
def store_decayed(tensors, b_q, b_k, before, after, at, rows, column, scale, BK: tl.constexpr, M: tl.constexpr):
    """Writes a block of K of what `prepare` decays, by 2^G (`before`) and 2^(G_C - G) (`after`), and 2^(G_C)."""
    decayed_q, decayed_k, asked, factors = tensors
    i = tl.arange(0, M.BT)
    d = column + tl.arange(0, BK)
    store_tokens(decayed_q, b_q * before * scale, at, rows, column, M.K, BK, M)
    store_tokens(decayed_k, b_k * after, at, rows, column, M.K, BK, M)
    if asked is not None:
        store_tokens(asked, b_k * before, at, rows, column, M.K, BK, M)
    total = tl.sum(tl.where(i[:, None] == M.BT - 1, before, 0.0), 0)
    tl.store(factors + tl.program_id(0).to(tl.int64) * M.K + d, total, mask=d < M.K)


@triton.jit
def gradients(q, k, beta, log_decay, sums, given, d_q, d_k, d_beta, d_log, chunks, scale, M: tl.constexpr):
    """Gradients of q, k, beta and log_decay, a program per chunk and head: over blocks of K, for each over those of V.

    given: values (E, or v of the additive form), d_out, d_v, states, d_states.
    """
    values, d_out, d_v, states, d_states = given
    state_at = tl.program_id(0).to(tl.int64) * M.K * M.V
    given = (values, d_out, d_v, states + state_at, d_states + state_at)
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    at, rows = place(chunks, M)
    i = tl.arange(0, M.BT)
    dtype = k.dtype.element_ty
    p = tl.zeros([M.BT, M.BT], M.ACC)  # dP, without scale
    x = tl.zeros([M.BT, M.BT], M.ACC)  # -X
    for j in range(0, M.V, M.BV):
        b_out = load_tokens(d_out, at, rows, j, M.V, M.BV, M).to(dtype)
        b_values = tl.trans(load_tokens(values, at, rows, j, M.V, M.BV, M).to(dtype))
        p = tl.dot(b_out, b_values, p, input_precision=M.PRECISION)
        if beta is not None:
            b_v = load_tokens(d_v, at, rows, j, M.V, M.BV, M).to(dtype)
            x = tl.dot(b_v, b_values, x, input_precision=M.PRECISION)
    below = i[:, None] > i[None, :]
    own = tl.sum(tl.where(i[:, None] == i[None, :], p, 0.0), 1) * scale
    if M.DECAY == 1:
        g, total = load_sums(sums + at, rows, M.H, M.BT)
        from_start, to_end, factor, high, low = scalar_decays(g, total, M.ACC)
        weights = between(high, low, M.BT, False, FINE)
        p *= weights
        x *= weights
    b_p = tl.where(below, p * scale, 0.0).to(dtype)
    b_x = tl.where(below, -x, 0.0).to(dtype)
    strength = 1.0 + tl.zeros([M.BT], M.ACC) if beta is None else load_numbers(beta + at, rows, M.H, M.BT, M.ACC)
    sum_beta = tl.zeros([M.BT], M.ACC)
    # Keys per block of the exact path; more would spill.
    FEW: tl.constexpr = M.BK if FINE else 16
    read = tl.zeros([M.BT], M.ACC)
    wrote = tl.zeros([M.BT], M.ACC)
    carried = tl.zeros([M.BK], M.ACC)
    # In loops, operands made of p and x before them would lie in registers all along and spill.
    if M.DECAY == 2:
        tensors, made, mild = (q, k, log_decay, d_q, d_k, d_log), (b_p, b_x, own, strength), True
        for c in range(0, M.K, M.BK):
            decays = load_tokens(log_decay, at, rows, c, M.K, M.BK, M).to(M.ACC) * LOG2_E
            mild = mild & is_mild(decays, k, M.BT)
        if mild:
            for c in tl.range(0, M.K, M.BK, disable_licm=True):
                sum_beta += channel_gradients(tensors, given, made, at, rows, c, scale, True, M.BK, M)
        else:
            for c in tl.range(0, M.K, FEW, disable_licm=True):
                sum_beta += channel_gradients(tensors, given, made, at, rows, c, scale, False, FEW, M)
    else:
        for c in tl.range(0, M.K, M.BK, disable_licm=True):
            g_q, y, g_k, through = state_products(given, at, rows, c, dtype, M.BK, M)
            b_q = load_tokens(q, at, rows, c, M.K, M.BK, M)
            b_k = load_tokens(k, at, rows, c, M.K, M.BK, M)
            w_q = b_q.to(M.ACC)
            w_k = b_k.to(M.ACC)
            g_q *= scale
            if M.DECAY == 1:
                g_q *= from_start[:, None]
                y *= to_end[:, None]
                g_k *= from_start[:, None]
                read += tl.sum(g_q * w_q - g_k * w_k, 1)
                wrote += tl.sum(y * w_k, 1) * strength
                carried += through
            strong_k = (w_k * strength[:, None]).to(dtype)
            s_q = tl.dot(b_p, strong_k, input_precision=M.PRECISION)
            s_y = tl.dot(tl.trans(b_p), b_q, input_precision=M.PRECISION)
            if beta is not None:
                s_y = tl.dot(tl.trans(b_x), b_k, s_y, input_precision=M.PRECISION)
                s_k = tl.dot(b_x, strong_k, input_precision=M.PRECISION)
                g_k = s_k - g_k
                if M.DECAY == 1:
                    read += tl.sum(s_k * w_k, 1)
            if M.DECAY == 1:
                # Of the rounded keys, so that rows and columns are sums of the same numbers.
                read += tl.sum(s_q * w_q - s_y * strong_k.to(M.ACC), 1)
            sum_beta += store_gradients(
                d_q, d_k, g_q + s_q, g_k, y + s_y, w_q, w_k, own, strength, at, rows, c, M.BK, M
            )
    if beta is not None:
        tl.store(d_beta + at + i * M.H, sum_beta.to(d_beta.dtype.element_ty), mask=i < rows)
    if M.DECAY == 1:
        b_log = tl.cumsum(read, 0, reverse=True) + sum_before(wrote, M.BT) + tl.sum(carried, 0) * factor
        tl.store(d_log + at + i * M.H, b_log.to(d_log.dtype.element_ty), mask=i < rows)


@triton.jit
def state_products(given, at, rows, column, dtype: tl.constexpr, BK: tl.constexpr, M: tl.constexpr):
    """A block of K of `(dout S^T, values dS^T, dv S^T, <S, dS>)`, `[BT,BK]` thrice and `[BK]`: without decays."""
    values, d_out, d_v, states, d_states = given
    g_q = tl.zeros([M.BT, BK], M.ACC)
    y = tl.zeros([M.BT, BK], M.ACC)
    g_k = tl.zeros([M.BT, BK], M.ACC)
    through = tl.zeros([BK], M.ACC)
    for j in range(0, M.V, M.BV):
        b_out = load_tokens(d_out, at, rows, j, M.V, M.BV, M).to(dtype)
        b_values = load_tokens(values, at, rows, j, M.V, M.BV, M).to(dtype)
        b_state = load_rows(states + column * M.V, M.K - column, j, M.V, M.V, BK, M.BV)
        b_d_state = load_rows(d_states + column * M.V, M.K - column, j, M.V, M.V, BK, M.BV)
        g_q = tl.dot(b_out, tl.trans(b_state), g_q, input_precision=M.PRECISION)
        y = tl.dot(b_values, tl.trans(b_d_state), y, input_precision=M.PRECISION)
        if M.DELTA:
            b_v = load_tokens(d_v, at, rows, j, M.V, M.BV, M).to(dtype)
            g_k = tl.dot(b_v, tl.trans(b_state), g_k, input_precision=M.PRECISION)
        if M.DECAY > 0:
            through += tl.sum(b_state.to(M.ACC) * b_d_state.to(M.ACC), 1)
    return g_q, y, g_k, through


@triton.jit
def channel_gradients(
    tensors, given, made, at, rows, column, scale, MILD: tl.constexpr, BK: tl.constexpr, M: tl.constexpr
):
    """A block of K of `gradients` with per-channel decay, MILD where `is_mild`; returns its part of dbeta."""
    q, k, log_decay, d_q, d_k, d_log = tensors
    b_p, b_x, own, strength = made
    LEVELS: tl.constexpr = M.BT.bit_length() - 1
    i = tl.arange(0, M.BT)
    if MILD:
        g_q, y, g_k, through = state_products(given, at, rows, column, b_p.dtype, BK, M)
    w_q = load_tokens(q, at, rows, column, M.K, BK, M).to(M.ACC)
    w_k = load_tokens(k, at, rows, column, M.K, BK, M).to(M.ACC)
    from_start = load_tokens(log_decay, at, rows, column, M.K, BK, M).to(M.ACC) * LOG2_E
    if MILD:
        grown, shrunk, first, second = centred_decays(from_start, M.BT)
        # Rows and columns are multiplied by the same rounded operands, so that they are sums of the same numbers.
        left = (w_k * strength[:, None] * shrunk).to(b_p.dtype)
        right = (w_q * grown).to(b_p.dtype)
        y *= second
        b_log = sum_rows_before(y * left, M.BT, BK) + first * second * through[None, :]
        g_q = tl.dot(b_p, left, g_q * (first * scale), input_precision=M.PRECISION)
        t_y = tl.dot(tl.trans(b_p), right, input_precision=M.PRECISION)
        turned = g_q * right
        if M.DELTA:
            right = (w_k * grown).to(b_p.dtype)
            g_k = tl.dot(b_x, left, -first * g_k, input_precision=M.PRECISION)
            t_y = tl.dot(tl.trans(b_x), right, t_y, input_precision=M.PRECISION)
            turned += g_k * right
        b_log += tl.cumsum(turned - t_y * left, 0, reverse=True)
    else:
        to_end = tl.zeros([M.BT, BK], M.ACC)
        s_q = tl.zeros([M.BT, BK], M.ACC)
        s_k = tl.zeros([M.BT, BK], M.ACC)
        s_y = tl.zeros([M.BT, BK], M.ACC)
        turned = tl.zeros([M.BT, BK], M.ACC)
        for level in tl.range(LEVELS, disable_licm=True):
            size = 1 << level
            pair = is_pair(size, M.BT)
            grown, shrunk = boundary_decays(from_start, to_end, size, M.BT)
            left = (w_k * strength[:, None] * shrunk).to(b_p.dtype)
            right = (w_q * grown).to(b_p.dtype)
            part = tl.where(pair, b_p, 0.0)
            t_q = tl.dot(part, left, input_precision=M.PRECISION)
            t_y = tl.dot(tl.trans(part), right, input_precision=M.PRECISION)
            turned += t_q * right
            s_q += t_q * grown
            if M.DELTA:
                right = (w_k * grown).to(b_p.dtype)
                part = tl.where(pair, b_x, 0.0)
                t_k = tl.dot(part, left, input_precision=M.PRECISION)
                t_y = tl.dot(tl.trans(part), right, t_y, input_precision=M.PRECISION)
                turned += t_k * right
                s_k += t_k * grown
            turned -= t_y * left
            s_y += t_y * shrunk
            from_start, to_end = merge_blocks(from_start, to_end, size, M.BT, BK)
        g_q, y, g_k, through = state_products(given, at, rows, column, b_p.dtype, BK, M)
        before = tl.math.exp2(from_start)
        g_q *= before * scale
        y *= tl.math.exp2(to_end)
        g_k *= before
        through *= tl.sum(tl.where(i[:, None] == M.BT - 1, before, 0.0), 0)
        b_log = tl.cumsum(turned + g_q * w_q - g_k * w_k, 0, reverse=True) + through[None, :]
        b_log += sum_rows_before(y * w_k * strength[:, None], M.BT, BK)
    store_tokens(d_log, b_log, at, rows, column, M.K, BK, M)
    if MILD:
        g_q, g_k, y = grown * g_q, grown * g_k, shrunk * (y + t_y)
    else:
        g_q, g_k, y = g_q + s_q, s_k - g_k, y + s_y
    return store_gradients(d_q, d_k, g_q, g_k, y, w_q, w_k, own, strength, at, rows, column, BK, M)


@triton.jit
def store_gradients(
    d_q, d_k, g_q, g_k, y, w_q, w_k, own, strength, at, rows, column, BK: tl.constexpr, M: tl.constexpr
):
    """Writes a block of K of dq and `dk = g_k + beta y`, each token's pair with itself added; returns `<y, k>`."""
    y += own[:, None] * w_q
    store_tokens(d_q, g_q + (own * strength)[:, None] * w_k, at, rows, column, M.K, BK, M)
    store_tokens(d_k, g_k + y * strength[:, None], at, rows, column, M.K, BK, M)
    return tl.sum(y * w_k, 1)
