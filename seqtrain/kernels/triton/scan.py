"""The diagonal recurrence as a Triton kernel: `h_t = a_t h_{t-1} + u_t` elementwise, in either direction.

A program takes the tokens of one piece and BD channels, BT tokens at a time: inside such a tile the recurrence is a
scan over pairs (a, u), and the last h is carried to the next tile. Where channels and documents alone are too few
programs, documents are cut into pieces: a first launch (TOTALS) finds each piece's whole decay and the h it ends with
from zero, the second starts from what the pieces before it make of the state (LOOKBACK). Decays are multiplied, never
divided.

Backward it is the same recurrence from the last token to the first, `g_t = d_out_t + conj(a_{t+1}) g_{t+1}`, where the
gradient of the final state enters as a token after the last; `d_log_a_t = g_t conj(a_t h_{t-1})`.
"""

import triton
import triton.language as tl


@triton.jit
def load_complex(pointer, at, mask, COMPLEX: tl.constexpr, ACC: tl.constexpr):
    """Real and imaginary parts of elements `at`, zeros where masked."""
    if COMPLEX:
        real = tl.load(pointer + 2 * at, mask=mask, other=0.0).to(ACC)
        imaginary = tl.load(pointer + 2 * at + 1, mask=mask, other=0.0).to(ACC)
    else:
        real = tl.load(pointer + at, mask=mask, other=0.0).to(ACC)
        imaginary = tl.zeros_like(real)
    return real, imaginary


@triton.jit
def store_complex(pointer, at, real, imaginary, mask, COMPLEX: tl.constexpr):
    """Writes what `load_complex` reads; without COMPLEX the real part alone."""
    kind = pointer.dtype.element_ty
    if COMPLEX:
        tl.store(pointer + 2 * at, real.to(kind), mask=mask)
        tl.store(pointer + 2 * at + 1, imaginary.to(kind), mask=mask)
    else:
        tl.store(pointer + at, real.to(kind), mask=mask)


@triton.jit
def load_decay(log_a, at, mask, SIGN: tl.constexpr, COMPLEX: tl.constexpr, ACC: tl.constexpr):
    """`exp(log_a)`, of which SIGN -1 takes the conjugate; 1 where masked."""
    real, angle = load_complex(log_a, at, mask, COMPLEX, ACC)
    size = tl.exp(real)
    if COMPLEX:
        return size * tl.cos(angle), SIGN * size * tl.sin(angle)
    else:
        return size, tl.zeros_like(size)


@triton.jit
def multiply_add(ar, ai, hr, hi, ur, ui, COMPLEX: tl.constexpr):
    """`a h + u`."""
    if COMPLEX:
        return ar * hr - ai * hi + ur, ar * hi + ai * hr + ui
    else:
        return ar * hr + ur, ui


@triton.jit
def _then(a1, u1, a2, u2):
    return a1 * a2, a2 * u1 + u2


@triton.jit
def _then_complex(a1r, a1i, u1r, u1i, a2r, a2i, u2r, u2i):
    return (a1r * a2r - a1i * a2i, a1r * a2i + a1i * a2r, a2r * u1r - a2i * u1i + u2r, a2r * u1i + a2i * u1r + u2i)


@triton.jit
def scan_tile(ar, ai, ur, ui, COMPLEX: tl.constexpr, BACK: tl.constexpr):
    """For every row, the map of all rows up to it (from it on, with BACK) as a decay and what it adds."""
    if COMPLEX:
        return tl.associative_scan((ar, ai, ur, ui), 0, _then_complex, reverse=BACK)
    else:
        decay, added = tl.associative_scan((ar, ur), 0, _then, reverse=BACK)
        return decay, ai, added, ui


@triton.jit
def pick_row(tile, row, BT: tl.constexpr):
    """One row of a tile."""
    return tl.sum(tl.where((tl.arange(0, BT) == row)[:, None], tile, 0.0), 0)


@triton.jit
def enter(totals, enters, piece, document, first, last, d, inside, D, M: tl.constexpr):
    """The state that enters a piece: the given one, taken through the pieces before it."""
    hr, hi = load_complex(enters, document * D + d, inside, M.COMPLEX, M.ACC)
    if M.LOOKBACK:
        before = piece - first
        if M.BACK:
            before = last - piece
        for j in range(before):
            n = first + j
            if M.BACK:
                n = last - j
            at = n.to(tl.int64) * 2 * D + d
            ar, ai = load_complex(totals, at, inside, M.COMPLEX, M.ACC)
            ur, ui = load_complex(totals, at + D, inside, M.COMPLEX, M.ACC)
            hr, hi = multiply_add(ar, ai, hr, hi, ur, ui, M.COMPLEX)
    return hr, hi


@triton.jit
def scan(u, log_a, kept, state, enters, out, leaves, d_log_a, totals, pieces, D, M: tl.constexpr):
    """One piece, BD channels. u: x, or the gradient of out. enters, leaves: states `[N,D]`, or their gradients.

    kept, state: h of all tokens and the initial state, with BACK. d_log_a: a row per token; A_SHARED: per piece.
    totals: `[P,2,D]`. log_a: `[tokens,D]`, `[D]` where A_SHARED.
    """
    piece = tl.program_id(0)
    d = tl.program_id(1) * M.BD + tl.arange(0, M.BD)
    inside = d < D
    document = tl.load(pieces + 5 * piece).to(tl.int64)
    start = tl.load(pieces + 5 * piece + 1)
    end = tl.load(pieces + 5 * piece + 2)
    first = tl.load(pieces + 5 * piece + 3)
    last = tl.load(pieces + 5 * piece + 4)
    SIGN: tl.constexpr = -1 if M.BACK else 1
    if M.TOTALS:
        hr = tl.zeros((M.BD,), M.ACC)
        hi = tl.zeros((M.BD,), M.ACC)
        whole_r = tl.full((M.BD,), 1.0, M.ACC)
        whole_i = tl.zeros((M.BD,), M.ACC)
    else:
        hr, hi = enter(totals, enters, piece, document, first, last, d, inside, D, M)
    if M.A_SHARED and M.BACK:
        sum_r = tl.zeros((M.BD,), M.ACC)
        sum_i = tl.zeros((M.BD,), M.ACC)

    for i in range(tl.cdiv(end - start, M.BT)):
        rows = end - (i + 1) * M.BT + tl.arange(0, M.BT) if M.BACK else start + i * M.BT + tl.arange(0, M.BT)
        real = (rows >= start) & (rows < end)
        mask = real[:, None] & inside[None, :]
        at = rows[:, None].to(tl.int64) * D + d[None, :]
        ur, ui = load_complex(u, at, mask, M.U_COMPLEX, M.ACC)
        # The decay on the way to a row: its own, or with BACK that of the next token. Rows that do not exist, and
        # the gradient of the final state, are not decayed.
        decayed = mask
        shift = 0
        if M.BACK:
            decayed = (real & ((rows < end - 1) | (piece < last)))[:, None] & inside[None, :]
            shift = 1
        where = at + shift * D
        if M.A_SHARED:
            where = tl.broadcast_to(d[None, :], (M.BT, M.BD))
        ar, ai = load_decay(log_a, where, decayed, SIGN, M.A_COMPLEX, M.ACC)
        ar, ai, ur, ui = scan_tile(ar, ai, ur, ui, M.COMPLEX, M.BACK)
        edge = M.BT - 1
        if M.BACK:
            edge = 0
        if M.TOTALS:
            er, ei = pick_row(ar, edge, M.BT), pick_row(ai, edge, M.BT)
            hr, hi = multiply_add(er, ei, hr, hi, pick_row(ur, edge, M.BT), pick_row(ui, edge, M.BT), M.COMPLEX)
            whole_r, whole_i = multiply_add(er, ei, whole_r, whole_i, tl.zeros_like(hr), tl.zeros_like(hr), M.COMPLEX)
        else:
            gr, gi = multiply_add(ar, ai, hr[None, :], hi[None, :], ur, ui, M.COMPLEX)
            store_complex(out, at, gr, gi, mask, M.OUT_COMPLEX)
            hr, hi = pick_row(gr, edge, M.BT), pick_row(gi, edge, M.BT)
            if M.BACK:
                # g times conj(a_t h_{t-1}); before a document's first token stands its initial state.
                is_first = (rows == start) & (piece == first)
                br, bi = load_complex(kept, at - D, mask & (~is_first)[:, None], M.COMPLEX, M.ACC)
                sr, si = load_complex(state, document * D + d, inside, M.COMPLEX, M.ACC)
                br = tl.where(is_first[:, None], sr[None, :], br)
                bi = tl.where(is_first[:, None], si[None, :], bi)
                own = at
                if M.A_SHARED:
                    own = where
                ar, ai = load_decay(log_a, own, mask, 1, M.A_COMPLEX, M.ACC)
                br, bi = multiply_add(ar, ai, br, bi, tl.zeros_like(br), tl.zeros_like(br), M.COMPLEX)
                br, bi = multiply_add(br, -bi, gr, gi, tl.zeros_like(br), tl.zeros_like(br), M.COMPLEX)
                if M.A_SHARED:
                    sum_r += tl.sum(tl.where(mask, br, 0.0), 0)
                    sum_i += tl.sum(tl.where(mask, bi, 0.0), 0)
                else:
                    store_complex(d_log_a, at, br, bi, mask, M.A_COMPLEX)

    if M.TOTALS:
        at = piece.to(tl.int64) * 2 * D + d
        store_complex(totals, at, whole_r, whole_i, inside, M.COMPLEX)
        store_complex(totals, at + D, hr, hi, inside, M.COMPLEX)
    else:
        if M.BACK:
            if M.A_SHARED:
                store_complex(d_log_a, piece.to(tl.int64) * D + d, sum_r, sum_i, inside, M.A_COMPLEX)
            own = start.to(tl.int64) * D + d
            if M.A_SHARED:
                own = d
            ar, ai = load_decay(log_a, own, inside, -1, M.A_COMPLEX, M.ACC)
            hr, hi = multiply_add(ar, ai, hr, hi, tl.zeros_like(hr), tl.zeros_like(hr), M.COMPLEX)
            store_complex(leaves, document * D + d, hr, hi, inside & (piece == first), M.COMPLEX)
        else:
            store_complex(leaves, document * D + d, hr, hi, inside & (piece == last), M.COMPLEX)
