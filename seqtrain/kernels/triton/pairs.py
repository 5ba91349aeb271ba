"""Tensor attention inside chunks as two Triton kernels: `_outputs` and `_gradients` of its chunked form.

A program takes one chunk and BW columns of the values, and keeps the two sums `[F,BW]` in registers while it goes over
the chunk's steps of C tokens. The pairs (t, i) of a step, with TG tokens t at a time, are the TG*C rows of its
products; those with i > t are zero. Backward it goes over the steps from the last, taking each one's part off the sums
again.
"""

import triton
import triton.language as tl

# Terms that a product must sum for `tl.dot` to take it: Triton before 3.8 refuses the C of a step.
LEAST = tl.constexpr(8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 16)
IEEE = tl.constexpr("ieee")


@triton.jit
def product(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr = IEEE):
    """`a @ b`, precisely: with the 10 bits of "tf32" the gradient of q, which nearly cancels, errs by 1e-2.

    PRECISION: for products of all pairs, which are most of the work, a way to float32's precision on matrix units. The
    small ones of a step's tokens do without, for the registers.
    """
    if a.shape[1] < LEAST:
        a = tl.reshape(tl.join(a, tl.zeros_like(a)), (a.shape[0], 2 * a.shape[1]))
        b = tl.reshape(tl.permute(tl.join(b, tl.zeros_like(b)), (0, 2, 1)), (2 * b.shape[0], b.shape[1]))
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def load_tile(pointer, row, columns, width, ROWS: tl.constexpr):
    """ROWS rows of `width` numbers from `row` on: `[ROWS,len(columns)]`, zeros beyond `width`."""
    at = (row.to(tl.int64) + tl.arange(0, ROWS))[:, None] * width + columns[None, :]
    return tl.load(pointer + at, mask=(columns < width)[None, :], other=0.0)


@triton.jit
def store_tile(pointer, tile, row, columns, width, ROWS: tl.constexpr):
    """Writes what `load_tile` reads."""
    at = (row.to(tl.int64) + tl.arange(0, ROWS))[:, None] * width + columns[None, :]
    tl.store(pointer + at, tile, mask=(columns < width)[None, :])


@triton.jit
def load_keys(k, v, n, lanes, lane, f, w, F, W, C: tl.constexpr):
    """Features of both keys, `[C,BF]`, and both values, `[C,BW]`, of step n of a chunk (a lane)."""
    first, second = ((2 * n) * lanes + lane) * C, ((2 * n + 1) * lanes + lane) * C
    k1, k2 = load_tile(k, first, f, F, C), load_tile(k, second, f, F, C)
    return k1, k2, load_tile(v, first, w, W, C), load_tile(v, second, w, W, C)


@triton.jit
def of_token(rows, TG: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """A row for each pair (t, i): that of token t. `[TG,WIDTH]` -> `[TG*C,WIDTH]`."""
    return tl.reshape(tl.broadcast_to(rows[:, None, :], (TG, C, WIDTH)), (TG * C, WIDTH))


@triton.jit
def of_past(rows, TG: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """A row for each pair (t, i): that of token i. `[C,WIDTH]` -> `[TG*C,WIDTH]`."""
    return tl.reshape(tl.broadcast_to(rows[None, :, :], (TG, C, WIDTH)), (TG * C, WIDTH))


@triton.jit
def by_token(pairs, TG: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over i, `[TG,WIDTH]`."""
    return tl.sum(tl.reshape(pairs, (TG, C, WIDTH)), 1)


@triton.jit
def by_past(pairs, TG: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr):
    """Sums over t, `[C,WIDTH]`."""
    return tl.sum(tl.reshape(pairs, (TG, C, WIDTH)), 0)


@triton.jit
def is_pair(first, TG: tl.constexpr, C: tl.constexpr):
    """Of tokens t from `first` on: pairs with i <= t, `[TG*C,1]`, and the j seen from a pair's t, `[TG*C,C]`."""
    pair = tl.arange(0, TG * C)[:, None]
    t = first + pair // C
    return pair % C <= t, tl.arange(0, C)[None, :] <= t


@triton.jit
def load_sums(sums, which, lanes, lane, f, w, F, W):
    """One of the two sums of a chunk, `[BF,BW]`."""
    at = ((which * lanes + lane).to(tl.int64) * F + f)[:, None] * W + w[None, :]
    return tl.load(sums + at, mask=(f < F)[:, None] & (w < W)[None, :], other=0.0)


@triton.jit
def store_sums(sums, tile, which, lanes, lane, f, w, F, W):
    """Writes what `load_sums` reads."""
    at = ((which * lanes + lane).to(tl.int64) * F + f)[:, None] * W + w[None, :]
    tl.store(sums + at, tile, mask=(f < F)[:, None] & (w < W)[None, :])


@triton.jit
def outputs(q, k, v, sums, out, lanes, steps, F, W, M: tl.constexpr):
    """q `[n,L,C,F]`, k `[n,2,L,C,F]`, v `[n,2,L,C,W]`, sums before each chunk `[2,L,F,W]` -> out `[n,L,C,W]`."""
    lane = tl.program_id(0)
    f = tl.arange(0, M.BF)
    w = tl.program_id(1) * M.BW + tl.arange(0, M.BW)
    s1 = load_sums(sums, 0, lanes, lane, f, w, F, W)
    s2 = load_sums(sums, 1, lanes, lane, f, w, F, W)
    for n in range(steps):
        k1, k2, v1, v2 = load_keys(k, v, n, lanes, lane, f, w, F, W, M.C)
        for group in range(M.C // M.TG):
            row = (n * lanes + lane) * M.C + group * M.TG
            pairs, seen = is_pair(group * M.TG, M.TG, M.C)
            query = load_tile(q, row, f, F, M.TG)
            queries = tl.where(pairs, of_token(query, M.TG, M.C, M.BF), 0.0)
            x1, x2 = queries * of_past(k1, M.TG, M.C, M.BF), queries * of_past(k2, M.TG, M.C, M.BF)
            both_new = tl.where(seen, product(x1, tl.trans(k2), M.ACC, M.PRECISION), 0.0)
            through = product(x1, s2, M.ACC, M.PRECISION) + product(both_new, v2, M.ACC, M.PRECISION)
            rows = by_token(through * of_past(v1, M.TG, M.C, M.BW), M.TG, M.C, M.BW)
            rows += by_token(product(x2, s1, M.ACC, M.PRECISION) * of_past(v2, M.TG, M.C, M.BW), M.TG, M.C, M.BW)
            rows += product(query, s1 * s2, M.ACC)
            store_tile(out, rows, row, w, W, M.TG)
        s1 += product(tl.trans(k1), v1, M.ACC)
        s2 += product(tl.trans(k2), v2, M.ACC)


@triton.jit
def gradients(q, k, v, sums, d_out, d_q, d_k, d_v, d_sums, lanes, steps, F, W, M: tl.constexpr):
    """Gradients of q, k, v and of the sums before each chunk; sums: after each chunk. d_q, d_k: one a block of W."""
    lane, block = tl.program_id(0), tl.program_id(1)
    f = tl.arange(0, M.BF)
    w = block * M.BW + tl.arange(0, M.BW)
    s1 = load_sums(sums, 0, lanes, lane, f, w, F, W)
    s2 = load_sums(sums, 1, lanes, lane, f, w, F, W)
    d_s1 = tl.zeros((M.BF, M.BW), M.ACC)
    d_s2 = tl.zeros((M.BF, M.BW), M.ACC)
    for back in range(steps):
        n = steps - 1 - back
        k1, k2, v1, v2 = load_keys(k, v, n, lanes, lane, f, w, F, W, M.C)
        s1 -= product(tl.trans(k1), v1, M.ACC)
        s2 -= product(tl.trans(k2), v2, M.ACC)
        # What keys and values owe to later steps.
        d_k1 = product(v1, tl.trans(d_s1), M.ACC)
        d_k2 = product(v2, tl.trans(d_s2), M.ACC)
        d_v1 = product(k1, d_s1, M.ACC)
        d_v2 = product(k2, d_s2, M.ACC)
        first = (n * lanes + lane) * M.C
        grads = load_tile(d_out, first, w, W, M.C)
        d_product = product(tl.trans(load_tile(q, first, f, F, M.C)), grads, M.ACC)
        d_s1 += d_product * s2
        d_s2 += d_product * s1
        for group in range(M.C // M.TG):
            row = first + group * M.TG
            pairs, seen = is_pair(group * M.TG, M.TG, M.C)
            grad = load_tile(d_out, row, w, W, M.TG)
            queries = tl.where(pairs, of_token(load_tile(q, row, f, F, M.TG), M.TG, M.C, M.BF), 0.0)
            x1, x2 = queries * of_past(k1, M.TG, M.C, M.BF), queries * of_past(k2, M.TG, M.C, M.BF)
            d_pairs = tl.where(pairs, of_token(grad, M.TG, M.C, M.BW), 0.0)
            d_1, d_2 = d_pairs * of_past(v1, M.TG, M.C, M.BW), d_pairs * of_past(v2, M.TG, M.C, M.BW)
            d_s1 += product(tl.trans(x2), d_2, M.ACC, M.PRECISION)
            d_s2 += product(tl.trans(x1), d_1, M.ACC, M.PRECISION)

            both_new = tl.where(seen, product(x1, tl.trans(k2), M.ACC, M.PRECISION), 0.0)
            through = product(x1, s2, M.ACC, M.PRECISION) + product(both_new, v2, M.ACC, M.PRECISION)
            d_v1 += by_past(through * d_pairs, M.TG, M.C, M.BW)
            d_v2 += by_past(product(x2, s1, M.ACC, M.PRECISION) * d_pairs, M.TG, M.C, M.BW)
            d_v2 += product(tl.trans(both_new), d_1, M.ACC, M.PRECISION)

            d_both_new = tl.where(seen, product(d_1, tl.trans(v2), M.ACC, M.PRECISION), 0.0)
            d_x1 = product(d_1, tl.trans(s2), M.ACC, M.PRECISION) + product(d_both_new, k2, M.ACC, M.PRECISION)
            d_x2 = product(d_2, tl.trans(s1), M.ACC, M.PRECISION)
            d_pair = tl.where(pairs, d_x1 * of_past(k1, M.TG, M.C, M.BF) + d_x2 * of_past(k2, M.TG, M.C, M.BF), 0.0)
            d_query = by_token(d_pair, M.TG, M.C, M.BF) + product(grad, tl.trans(s1 * s2), M.ACC)
            store_tile(d_q, d_query, (block * steps * lanes) * M.C + row, f, F, M.TG)
            d_k1 += by_past(d_x1 * queries, M.TG, M.C, M.BF)
            d_k2 += by_past(d_x2 * queries, M.TG, M.C, M.BF) + product(tl.trans(d_both_new), x1, M.ACC, M.PRECISION)
        one, other = (2 * n) * lanes + lane, (2 * n + 1) * lanes + lane
        before = block * steps * 2 * lanes
        store_tile(d_k, d_k1, (before + one) * M.C, f, F, M.C)
        store_tile(d_k, d_k2, (before + other) * M.C, f, F, M.C)
        store_tile(d_v, d_v1, one * M.C, w, W, M.C)
        store_tile(d_v, d_v2, other * M.C, w, W, M.C)
    store_sums(d_sums, d_s1, 0, lanes, lane, f, w, F, W)
    store_sums(d_sums, d_s2, 1, lanes, lane, f, w, F, W)
