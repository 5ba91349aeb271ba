"""Device functions on a block of V columns of a matrix state, which a program holds in parts: tuples of tiles.

Each of PARTS tiles is `[BK / PARTS, BV]`. One part is the rule; but a state of wide keys in float32 is as one operand
more than a thread's registers, and so are a chunk's tiles `[BT,BK]`, which are then read part by part, and again
wherever they are needed again.
"""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import load_rows, store_rows


@triton.jit
def load_state(pointer, column, M: tl.constexpr):
    """A block of V columns of a state `[K,V]`, in PARTS."""
    PARTS: tl.constexpr = M.PARTS
    PART: tl.constexpr = M.BK // PARTS
    state = tl.tuple(())
    for p in tl.static_range(PARTS):
        state += (load_rows(pointer + p * PART * M.V, M.K - p * PART, column, M.V, M.V, PART, M.BV).to(M.ACC),)
    return state


@triton.jit
def store_state(pointer, state, column, M: tl.constexpr):
    """Writes what `load_state` would read, in the pointer's dtype."""
    PARTS: tl.constexpr = M.PARTS
    PART: tl.constexpr = M.BK // PARTS
    for p in tl.static_range(PARTS):
        store_rows(pointer + p * PART * M.V, state[p], M.K - p * PART, column, M.V, M.V, PART, M.BV)


@triton.jit
def read_parts(first, second, rows, state, M: tl.constexpr):
    """`tile state` `[BT,BV]` of the tile `[BT,BK]` at each of two pointers, the second of which may be None."""
    PARTS: tl.constexpr = M.PARTS
    PART: tl.constexpr = M.BK // PARTS
    found = tl.zeros([M.BT if second is None else 2 * M.BT, M.BV], state[0].dtype)
    for p in tl.static_range(PARTS):
        tile = load_rows(first, rows, p * PART, M.H * M.K, M.K, M.BT, PART)
        if second is not None:
            # As one tile: each product of its own would hold what it makes of the state until the other is done.
            other = load_rows(second, rows, p * PART, M.H * M.K, M.K, M.BT, PART)
            tile = tl.reshape(tl.permute(tl.join(tile, other), (2, 0, 1)), (2 * M.BT, PART))
        found = tl.dot(tile, state[p].to(tile.dtype), found, input_precision=M.PRECISION)
    if second is None:
        return found, found
    else:
        return tl.split(tl.permute(tl.reshape(found, (2, M.BT, M.BV)), (1, 2, 0)))


@triton.jit
def write_state(tile, pointer, rows, written, state, M: tl.constexpr):
    """`state + tile^T written` of a tile `[BT,BK]`, `written` `[BT,BV]` in its dtype.

    With several parts the tile is read again from where it lies, `pointer`.
    """
    PARTS: tl.constexpr = M.PARTS
    PART: tl.constexpr = M.BK // PARTS
    after = tl.tuple(())
    for p in tl.static_range(PARTS):
        part = tile if PARTS == 1 else load_rows(pointer, rows, p * PART, M.H * M.K, M.K, M.BT, PART)
        after += (tl.dot(tl.trans(part), written, state[p], input_precision=M.PRECISION),)
    return after


@triton.jit
def decay_state(state, factor, M: tl.constexpr):
    """`factor state`: a number, or with DECAY 2 `[BK]` in PARTS."""
    PARTS: tl.constexpr = M.PARTS
    after = tl.tuple(())
    for p in tl.static_range(PARTS):
        if M.DECAY == 2:
            after += (state[p] * factor[p][:, None],)
        else:
            after += (state[p] * factor,)
    return after
