"""Device functions of the kernels: tiles of rows, decays of a chunk, its halves, and the inverse of a unit triangle."""

import triton
import triton.language as tl

from seqtrain.kernels import decay

LOG2_E = tl.constexpr(1.4426950408889634)
FORGOTTEN = tl.constexpr(decay.FORGOTTEN)


@triton.jit
def load_rows(pointer, rows, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """`[BT,BW]` from `column` on, of rows STRIDE apart and WIDTH wide; zeros from row `rows` on and beyond WIDTH."""
    i = tl.arange(0, BT)
    d = column + tl.arange(0, BW)
    mask = (i < rows)[:, None]
    if WIDTH % BW != 0:
        mask = mask & (d < WIDTH)[None, :]
    return tl.load(pointer + i[:, None] * STRIDE + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(
    pointer, tile, rows, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr
):
    """Writes what `load_rows` would read, in the pointer's dtype."""
    i = tl.arange(0, BT)
    d = column + tl.arange(0, BW)
    mask = (i < rows)[:, None]
    if WIDTH % BW != 0:
        mask = mask & (d < WIDTH)[None, :]
    tl.store(pointer + i[:, None] * STRIDE + d[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_tokens(pointer, at, rows, column, WIDTH: tl.constexpr, BW: tl.constexpr, M: tl.constexpr):
    """`load_rows` of a chunk's tokens, of one head: row `at` of `[tokens * H, WIDTH]` is the first."""
    return load_rows(pointer + at * WIDTH, rows, column, M.H * WIDTH, WIDTH, M.BT, BW)


@triton.jit
def store_tokens(pointer, tile, at, rows, column, WIDTH: tl.constexpr, BW: tl.constexpr, M: tl.constexpr):
    """Writes what `load_tokens` would read."""
    store_rows(pointer + at * WIDTH, tile, rows, column, M.H * WIDTH, WIDTH, M.BT, BW)


@triton.jit
def load_numbers(pointer, rows, STRIDE: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr):
    """One number per row, `[BT]`; zeros from row `rows` on."""
    i = tl.arange(0, BT)
    return tl.load(pointer + i * STRIDE, mask=i < rows, other=0.0).to(ACC)


@triton.jit
def sum_decays(log_decay):
    """Of a chunk's decays `[BT]`, float64: G `[BT]` and `G_C`."""
    # Strong decays take G into the thousands, where a float32 difference is wrong by 1e-4.
    g = tl.maximum(log_decay, FORGOTTEN) * LOG2_E
    return tl.cumsum(g, 0), tl.sum(g, 0)


@triton.jit
def load_sums(pointer, rows, H: tl.constexpr, BT: tl.constexpr):
    """G of a chunk `[BT]` and `G_C`, of rows H apart, float64; from row `rows` on G is `G_C`."""
    total = tl.load(pointer + (tl.minimum(rows, BT) - 1) * H, mask=rows > 0, other=0.0)
    return tl.where(tl.arange(0, BT) < rows, load_numbers(pointer, rows, H, BT, tl.float64), total), total


@triton.jit
def in_parts(sums, ACC: tl.constexpr):
    """G in two parts `[BT]` for `between`: with their sum differences are exact."""
    high = sums.to(ACC)
    return high, (sums - high.to(tl.float64)).to(ACC)


@triton.jit
def scalar_decays(sums, total, ACC: tl.constexpr):
    """Of G and `G_C`: `2^G` `[BT]`, `2^(G_C - G)` `[BT]`, `2^(G_C)`, and `in_parts`."""
    high, low = in_parts(sums, ACC)
    return tl.math.exp2(high), tl.math.exp2((total - sums).to(ACC)), tl.math.exp2(total.to(ACC)), high, low


@triton.jit
def between(high, low, BT: tl.constexpr, BACK: tl.constexpr, FINE: tl.constexpr):
    """`D_ij`, zero for i < j; with BACK its transpose. `[BT,BT]`. FINE: exact for strong decays, too."""
    i = tl.arange(0, BT)
    if BACK:
        exponent = high[None, :] - high[:, None]
        if FINE:
            exponent += low[None, :] - low[:, None]
        return tl.math.exp2(tl.where(i[:, None] <= i[None, :], exponent, -float("inf")))
    exponent = high[:, None] - high[None, :]
    if FINE:
        exponent += low[:, None] - low[None, :]
    return tl.math.exp2(tl.where(i[:, None] >= i[None, :], exponent, -float("inf")))


@triton.jit
def is_later(size, BT: tl.constexpr):
    """Which rows lie in the right one of a pair of blocks of `size` rows, `[BT]`."""
    return (tl.arange(0, BT) // size) % 2 == 1


@triton.jit
def is_pair(size, BT: tl.constexpr):
    """Which `(i, j)` have i in the right block and j in the left block of one pair, `[BT,BT]`."""
    block = tl.arange(0, BT) // size
    return (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)


@triton.jit
def is_mild(decays, operand, BT: tl.constexpr):
    """Whether the log2 decays `[BT,BW]` of each half of a chunk sum to so little that its middle may stand for
    boundaries.

    Operands, of the dtype that the pointer `operand` has, then grow by that much at most.
    """
    # What bfloat16 holds without overflow. float16 holds little; of float32 sums must be exact to 1e-6, too.
    most = 100.0
    if operand.dtype.element_ty == tl.float16:
        most = 4.0
    if operand.dtype.element_ty == tl.float32:
        most = 8.0
    size = tl.abs(decays)
    first = tl.sum(tl.where(tl.arange(0, BT)[:, None] < BT // 2, size, 0.0), 0)
    return tl.max(tl.maximum(first, tl.sum(size, 0) - first), 0) <= most


@triton.jit
def centred_decays(decays, BT: tl.constexpr):
    """Of log2 decays `[BT,BW]`, m the token in the middle: `2^(G - G_m)`, `2^(G_m - G)`, `2^(G_m)`, `2^(G_C - G_m)`."""
    middle = tl.sum(tl.where(tl.arange(0, BT)[:, None] < BT // 2, decays, 0.0), 0)[None, :]
    away = tl.cumsum(decays, 0) - middle
    rest = tl.sum(decays, 0)[None, :] - middle
    return tl.math.exp2(away), tl.math.exp2(-away), tl.math.exp2(middle), tl.math.exp2(rest)


@triton.jit
def boundary_decays(from_start, to_end, size, BT: tl.constexpr):
    """For pairs of blocks of `size` rows: what right rows decayed by since their pair's boundary, and left ones will up
    to it; 0 for other rows. `from_start`, `to_end`: as in `merge_blocks`.
    """
    later = is_later(size, BT)[:, None]
    decay = tl.math.exp2(tl.where(later, from_start, to_end))
    return tl.where(later, decay, 0.0), tl.where(later, 0.0, decay)


@triton.jit
def merge_blocks(from_start, to_end, size, BT: tl.constexpr, BW: tl.constexpr):
    """Sums of log2 decays from the start of a row's block on, and after it to the block's end: of blocks twice `size`.

    `[BT,BW]` each, of blocks of `size` rows. Every sum is over just its own terms, at any size.
    """
    i = tl.arange(0, BT)
    later = is_later(size, BT)[:, None]
    left = i // (2 * size) * (2 * size) + size - 1  # the left block's last row
    # A right row needs what its left block sums to, and a left one what its right block does.
    other = tl.where(later, left[:, None], left[:, None] + size)
    total = tl.gather(from_start, tl.broadcast_to(other, (BT, BW)), 0)
    return from_start + tl.where(later, total, 0.0), to_end + tl.where(later, 0.0, total)


@triton.jit
def sum_before(x, BT: tl.constexpr):
    """Row t: the sum of the rows before it. `[BT]`."""
    i = tl.arange(0, BT)
    return tl.sum(tl.where(i[None, :] < i[:, None], x[None, :], 0.0), 1)


@triton.jit
def sum_rows_before(x, BT: tl.constexpr, BW: tl.constexpr):
    """Row t: the sum of the rows before it. `[BT,BW]`."""
    i = tl.arange(0, BT)[:, None]
    above = tl.gather(x, tl.broadcast_to(tl.maximum(i - 1, 0), (BT, BW)), 0)
    return tl.cumsum(tl.where(i > 0, above, 0.0), 0)


@triton.jit
def invert(below, BT: tl.constexpr, PRECISION: tl.constexpr):
    """`(I + below)^-1` for `below` zero on and above the diagonal, `[BT,BT]`.

    Forward substitution in blocks of 16 rows, all at a time, then pairs of blocks are merged by products. (A series of
    powers would err by 1e9 for keys that are alike.)
    """
    BLOCKS: tl.constexpr = BT // 16
    b = tl.arange(0, BLOCKS)
    r = tl.arange(0, 16)
    own = (b[:, None] == b[None, :])[:, None, :, None]
    blocks = -tl.sum(tl.where(own, tl.reshape(below, (BLOCKS, 16, BLOCKS, 16)), 0.0), 2)
    found = blocks
    for n in tl.static_range(1, 16):
        row = tl.sum(tl.where(r[None, :, None] == n, blocks, 0.0), 1)
        row += tl.sum(row[:, :, None] * found, 1)
        found = tl.where(r[None, :, None] == n, row[:, None, :], found)
    found += tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :]
    whole = tl.broadcast_to(found[:, :, None, :], (BLOCKS, 16, BLOCKS, 16))
    inverse = tl.reshape(tl.where(own, whole, 0.0), (BT, BT))
    if BT >= 32:
        inverse = merge_inverses(inverse, below, BT, 16, PRECISION)
    if BT >= 64:
        inverse = merge_inverses(inverse, below, BT, 32, PRECISION)
    return inverse


@triton.jit
def merge_inverses(inverse, below, BT: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse in blocks twice SIZE: the lower left half of each is `-right below left`."""
    corner = tl.dot(tl.where(is_pair(SIZE, BT), below, 0.0), inverse, input_precision=PRECISION)
    return inverse - tl.dot(inverse, corner, input_precision=PRECISION)
