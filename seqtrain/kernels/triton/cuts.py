"""A document cut into pieces that run side by side: kernels that find the state before each piece.

A piece of the recurrences of `matrix` maps the state before it, and the gradient of the state after it:

    S -> transition S + update                dS -> transition^T dS + d_update

The transition of the additive form is a product of decays, that of the delta rule a matrix: the state after a piece
whose values are zero and whose state was the identity. `maps` finds those of all pieces at a time, `carry` goes from
piece to piece; `forward` and `reverse` of `matrix` do the rest, each piece by itself. Names are those of `matrix`.
`transition`: None without decay, `[P, H]`, `[P, H, K]`, or `[P, H, K, K]` of the delta rule.
"""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import load_rows, store_rows
from seqtrain.kernels.triton.matrix import go_back, go_forward, place
from seqtrain.kernels.triton.state import load_state, store_state


@triton.jit
def maps(made, v, beta, d_out, transition, update, d_update, pieces, scale, M: tl.constexpr):
    """`transition` and `update` of each piece and, where `d_out` is given, `d_update`.

    One program per piece, head and block of V, again of V for `d_update`, of K for the transition of the delta rule.
    What nobody asks for, of a document's first or last piece, is not found. `log_decay` given, `sums` are written.
    """
    VALUES: tl.constexpr = (M.V + M.BV - 1) // M.BV
    KEYS: tl.constexpr = (M.K + M.BV - 1) // M.BV if M.DELTA else 0
    BLOCKS: tl.constexpr = VALUES + KEYS if d_out is None else 2 * VALUES + KEYS
    block, nh, where, opens, closes = place(pieces, BLOCKS, M)
    h, start, length, chunk = where
    if d_out is None:
        length = tl.where(closes >= 0, 0, length)
        map_forward(made, v, beta, transition, update, block, nh, (h, start, length, chunk), scale, M)
    elif block < VALUES + KEYS:
        # The transition of a last piece takes gradients back; the additive form finds it beside the update.
        length = tl.where((closes >= 0) & (block < VALUES) & M.DELTA, 0, length)
        map_forward(made, v, beta, transition, update, block, nh, (h, start, length, chunk), scale, M)
    else:
        length = tl.where(opens >= 0, 0, length)
        d_state = identity(0, False, M)
        column = (block - VALUES - KEYS) * M.BV
        where = h, start, length, chunk
        d_state = go_back(made, beta, (d_out, None, None), d_state, column, where, scale, M)
        store_state(d_update + nh * M.K * M.V, d_state, column, M)


@triton.jit
def map_forward(made, v, beta, transition, update, block, nh, where, scale, M: tl.constexpr):
    """A block of columns of `update`, and of the delta rule's `transition` after those."""
    VALUES: tl.constexpr = (M.V + M.BV - 1) // M.BV
    PARTS: tl.constexpr = M.PARTS
    PART: tl.constexpr = M.BK // PARTS
    of_keys = block >= VALUES
    column = tl.where(of_keys, block - VALUES, block) * M.BV
    state = identity(column, of_keys, M)
    values = tl.where(of_keys, 0, where[2])
    TRACK: tl.constexpr = M.DECAY > 0 and not M.DELTA
    written_to = None, None, None
    state, through = go_forward(made, v, beta, written_to, state, column, where, values, scale, TRACK, M)
    if M.DELTA and of_keys:
        for p in tl.static_range(PARTS):
            rows = transition + nh * M.K * M.K + p * PART * M.K
            store_rows(rows, state[p], M.K - p * PART, column, M.K, M.K, PART, M.BV)
    else:
        store_state(update + nh * M.K * M.V, state, column, M)
    if TRACK and M.DECAY == 1:
        tl.store(transition + nh + tl.arange(0, 1), through, mask=(tl.arange(0, 1) == 0) & (column == 0))
    elif TRACK:
        for p in tl.static_range(PARTS):
            d = p * PART + tl.arange(0, PART)
            tl.store(transition + nh * M.K + d, through[p], mask=(d < M.K) & (column == 0))


@triton.jit
def identity(column, wanted, M: tl.constexpr):
    """A block of columns of the identity `[K,K]`, or of zeros, in PARTS."""
    PARTS: tl.constexpr = M.PARTS
    PART: tl.constexpr = M.BK // PARTS
    found = tl.tuple(())
    for p in tl.static_range(PARTS):
        d = p * PART + tl.arange(0, PART)
        own = d[:, None] == column + tl.arange(0, M.BV)[None, :]
        found += (tl.where(own & wanted, 1.0, 0.0).to(M.ACC),)
    return found


@triton.jit
def carry(transition, update, initial, starts, d_update, d_final, ends, documents, M: tl.constexpr):
    """From piece to piece: `starts`, the state before each, and, where `d_update` is given, `ends`, the gradient of the
    state after each.

    One program per document, head and block of V, again of V for `ends`. `documents`: int32 `[N, 3]`, first piece,
    pieces, and the first of them in `transition` and what is like it, where only documents of several pieces are.
    """
    VALUES: tl.constexpr = (M.V + M.BV - 1) // M.BV
    BLOCKS: tl.constexpr = VALUES if d_update is None else 2 * VALUES
    block, nh = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    # What is known when compiled stands alone: the other branch is not there then.
    if d_update is None:  # noqa: SIM114
        carry_one(transition, update, initial, starts, documents, block, nh, False, M)
    elif block < VALUES:
        carry_one(transition, update, initial, starts, documents, block, nh, False, M)
    else:
        carry_one(transition, d_update, d_final, ends, documents, block - VALUES, nh, True, M)


@triton.jit
def carry_one(transition, update, source, target, documents, block, nh, BACK: tl.constexpr, M: tl.constexpr):
    """`carry` in one direction: from `source`, a state of each document, to `target`, one of each piece."""
    h, row, column = nh % M.H, documents + 3 * (nh // M.H), block * M.BV
    first, count, mapped = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2).to(tl.int64)
    state = load_state(source + nh.to(tl.int64) * M.K * M.V, column, M)
    piece = first + count - 1 if BACK else first
    store_state(target + (piece * M.H + h) * M.K * M.V, state, column, M)
    for p in range(1, count):
        at = (mapped + (count - p if BACK else p - 1)) * M.H + h
        state = apply(transition, update + at * M.K * M.V, at, state, column, BACK, M)
        piece = first + (count - 1 - p if BACK else p)
        store_state(target + (piece * M.H + h) * M.K * M.V, state, column, M)


@triton.jit
def load_tile(transition, at, r, p, PART: tl.constexpr, M: tl.constexpr):
    """Rows of part r and columns of part p of the transition `at`."""
    rows = transition + (at * M.K + r * PART) * M.K
    return load_rows(rows, M.K - r * PART, p * PART, M.K, M.K, PART, PART)


@triton.jit
def apply(transition, update, at, state, column, BACK: tl.constexpr, M: tl.constexpr):
    """`transition state + update` of the map `at`, or with BACK `transition^T state + update`."""
    PARTS: tl.constexpr = M.PARTS
    PART: tl.constexpr = M.BK // PARTS
    after = tl.tuple(())
    for r in tl.static_range(PARTS):
        part = load_rows(update + r * PART * M.V, M.K - r * PART, column, M.V, M.V, PART, M.BV).to(M.ACC)
        if M.DELTA:
            for p in tl.static_range(PARTS):
                if BACK:
                    tile = load_tile(transition, at, p, r, PART, M)
                    tile = tl.trans(tile)
                else:
                    tile = load_tile(transition, at, r, p, PART, M)
                part = tl.dot(tile, state[p], part, input_precision=M.PRECISION)
        elif M.DECAY == 1:
            part += tl.load(transition + at) * state[r]
        elif M.DECAY == 2:
            d = r * PART + tl.arange(0, PART)
            part += tl.load(transition + at * M.K + d, mask=d < M.K, other=0.0)[:, None] * state[r]
        else:
            part += state[r]
        after += (part,)
    return after
