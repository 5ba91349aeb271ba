"""Device functions on a block of V columns of a matrix state, which a program holds in parts: tuples of tiles.

Each of PARTS tiles is `[BK / PARTS, BV]`. One part is the rule; but a state of wide keys in float32 is as one operand
more than a thread's registers, and so are a chunk's tiles `[BT,BK]`, which are then read part by part, and again
wherever they are needed again.
"""

import triton
import triton.language as tl

from seqtrain.kernels.triton.chunks import load_rows, store_rows


@triton.jit
def load_state(
    pointer,
    column,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """A block of V columns of a state `[K,V]`, in PARTS."""
    PART: tl.constexpr = BK // PARTS
    state = tl.tuple(())
    for p in tl.static_range(PARTS):
        state += (load_rows(pointer + p * PART * V, K - p * PART, column, V, V, PART, BV).to(ACC),)
    return state


@triton.jit
def store_state(
    pointer, state, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PARTS: tl.constexpr
):
    """Writes what `load_state` would read, in the pointer's dtype."""
    PART: tl.constexpr = BK // PARTS
    for p in tl.static_range(PARTS):
        store_rows(pointer + p * PART * V, state[p], K - p * PART, column, V, V, PART, BV)


@triton.jit
def read_parts(
    first,
    second,
    rows,
    state,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`tile state` `[BT,BV]` of the tile `[BT,BK]` at each of two pointers, the second of which may be None."""
    PART: tl.constexpr = BK // PARTS
    found = tl.zeros([BT if second is None else 2 * BT, BV], state[0].dtype)
    for p in tl.static_range(PARTS):
        tile = load_rows(first, rows, p * PART, H * K, K, BT, PART)
        if second is not None:
            # As one tile: each product of its own would hold what it makes of the state until the other is done.
            other = load_rows(second, rows, p * PART, H * K, K, BT, PART)
            tile = tl.reshape(tl.permute(tl.join(tile, other), (2, 0, 1)), (2 * BT, PART))
        found = tl.dot(tile, state[p].to(tile.dtype), found, input_precision=PRECISION)
    if second is None:
        return found, found
    else:
        return tl.split(tl.permute(tl.reshape(found, (2, BT, BV)), (1, 2, 0)))


@triton.jit
def write_state(
    tile,
    pointer,
    rows,
    written,
    state,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`state + tile^T written` of a tile `[BT,BK]`, `written` `[BT,BV]` in its dtype.

    With several parts the tile is read again from where it lies, `pointer`.
    """
    PART: tl.constexpr = BK // PARTS
    after = tl.tuple(())
    for p in tl.static_range(PARTS):
        part = tile if PARTS == 1 else load_rows(pointer, rows, p * PART, H * K, K, BT, PART)
        after += (tl.dot(tl.trans(part), written, state[p], input_precision=PRECISION),)
    return after


@triton.jit
def decay_state(state, factor, PARTS: tl.constexpr, DECAY: tl.constexpr):
    """`factor state`: a number, or with DECAY 2 `[BK]` in PARTS."""
    after = tl.tuple(())
    for p in tl.static_range(PARTS):
        if DECAY == 2:
            after += (state[p] * factor[p][:, None],)
        else:
            after += (state[p] * factor,)
    return after
