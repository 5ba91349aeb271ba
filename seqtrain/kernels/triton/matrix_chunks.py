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
    """What needs no state: of the delta rule `inverse` and `sums`; with per-channel decay, P and decayed operands.

    One program per chunk and head. The additive form without per-channel decay needs no preparation.
    """
    FINE: tl.constexpr = k.dtype.element_ty.primitive_bitwidth >= 32
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    token = tl.load(chunks + 5 * n + 1)
    rows = tl.load(chunks + 5 * n + 2) - token
    at = token.to(tl.int64) * H + h
    i = tl.arange(0, BT)
    state_at = n.to(tl.int64) * H + h
    # Keys per block of the exact path; more would spill.
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
                    b_log = load_rows(log_decay + at * K, rows, few, H * K, K, BT, FEW).to(ACC) * LOG2_E
                    p, below, before, after = add_exact_pairs(
                        p, below, b_q, w_k, b_log, b_k.dtype, inverse is not None, BT, FEW, ACC, PRECISION
                    )
                    store_decayed(
                        b_q, w_k, before, after, decayed_q, decayed_k, asked, factors, at, state_at, rows, few, scale,
                        H, K, BT, FEW,
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
def add_exact_pairs(
    p,
    below,
    q,
    k,
    decays,
    dtype: tl.constexpr,
    DELTA: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P and, with DELTA, N of a block of K at any decays, added to `p` and `below`; with these 2^G and 2^(G_C - G)."""
    LEVELS: tl.constexpr = BT.bit_length() - 1
    i = tl.arange(0, BT)
    from_start, to_end = decays, tl.zeros([BT, BK], ACC)
    p += tl.where(i[:, None] == i[None, :], tl.sum(q * k, 1)[:, None], 0.0)
    for level in tl.range(LEVELS, disable_licm=True):
        size = 1 << level
        pair = is_pair(size, BT)
        grown, shrunk = boundary_decays(from_start, to_end, size, BT)
        right = tl.trans((k * shrunk).to(dtype))
        p += tl.where(pair, tl.dot((q * grown).to(dtype), right, input_precision=PRECISION), 0.0)
        if DELTA:
            below += tl.where(pair, tl.dot((k * grown).to(dtype), right, input_precision=PRECISION), 0.0)
        from_start, to_end = merge_blocks(from_start, to_end, size, BT, BK)
    return p, below, tl.math.exp2(from_start), tl.math.exp2(to_end)


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

    One program per chunk and head; it goes over blocks of K, and for each over blocks of V.
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
    # Keys per block of the exact path; more would spill.
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
                sum_beta += channel_gradients(
                    q, k, log_decay, values, d_out, d_v, states, d_states, d_q, d_k, d_log, b_p, b_x, own, strength,
                    at, state_at, rows, c, scale, True, beta is not None, H, K, V, BT, BK, BV, ACC, PRECISION,
                )  # fmt: skip
        else:
            for c in tl.range(0, K, FEW, disable_licm=True):
                sum_beta += channel_gradients(
                    q, k, log_decay, values, d_out, d_v, states, d_states, d_q, d_k, d_log, b_p, b_x, own, strength,
                    at, state_at, rows, c, scale, False, beta is not None, H, K, V, BT, FEW, BV, ACC, PRECISION,
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
def channel_gradients(
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
    MILD: tl.constexpr,
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
    """A block of K of `gradients` with per-channel decay, MILD where `is_mild`; returns its part of dbeta."""
    LEVELS: tl.constexpr = BT.bit_length() - 1
    i = tl.arange(0, BT)
    if MILD:
        g_q, y, g_k, through = state_products(
            d_out + at * V, values + at * V, d_v + at * V, states + state_at + column * V,
            d_states + state_at + column * V, rows, K - column, b_p.dtype, DELTA, True, H, V, BT, BK, BV, ACC,
            PRECISION,
        )  # fmt: skip
    w_q = load_rows(q + at * K, rows, column, H * K, K, BT, BK).to(ACC)
    w_k = load_rows(k + at * K, rows, column, H * K, K, BT, BK).to(ACC)
    from_start = load_rows(log_decay + at * K, rows, column, H * K, K, BT, BK).to(ACC) * LOG2_E
    if MILD:
        grown, shrunk, first, second = centred_decays(from_start, BT)
        # Rows and columns are multiplied by the same rounded operands, so that they are sums of the same numbers.
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
    else:
        to_end = tl.zeros([BT, BK], ACC)
        s_q = tl.zeros([BT, BK], ACC)
        s_k = tl.zeros([BT, BK], ACC)
        s_y = tl.zeros([BT, BK], ACC)
        turned = tl.zeros([BT, BK], ACC)
        for level in tl.range(LEVELS, disable_licm=True):
            size = 1 << level
            pair = is_pair(size, BT)
            grown, shrunk = boundary_decays(from_start, to_end, size, BT)
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
            d_out + at * V, values + at * V, d_v + at * V, states + state_at + column * V,
            d_states + state_at + column * V, rows, K - column, b_p.dtype, DELTA, True, H, V, BT, BK, BV, ACC,
            PRECISION,
        )  # fmt: skip
        before = tl.math.exp2(from_start)
        g_q *= before * scale
        y *= tl.math.exp2(to_end)
        g_k *= before
        through *= tl.sum(tl.where(i[:, None] == BT - 1, before, 0.0), 0)
        b_log = tl.cumsum(turned + g_q * w_q - g_k * w_k, 0, reverse=True) + through[None, :]
        b_log += sum_rows_before(y * w_k * strength[:, None], BT, BK)
    store_rows(d_log + at * K, b_log, rows, column, H * K, K, BT, BK)
    if MILD:
        g_q, g_k, y = grown * g_q, grown * g_k, shrunk * (y + t_y)
    else:
        g_q, g_k, y = g_q + s_q, s_k - g_k, y + s_y
    return store_gradients(d_q + at * K, d_k + at * K, g_q, g_k, y, w_q, w_k, own, strength, rows, column, H, K, BT, BK)


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
