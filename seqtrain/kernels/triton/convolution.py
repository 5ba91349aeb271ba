"""The short causal convolution as two Triton kernels, forward and backward.

A document is `past` inputs that were given, rows -past ... -1, and its tokens, rows 0 ...; both kernels go over pieces
of these rows, BT at a time, BD channels a program. Row r of the inputs reaches rows r, r+dilation, ... of the outputs.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(x, state, first, start, tokens, past, document, d, inside, D, ACC: tl.constexpr, BT: tl.constexpr):
    """Inputs of a document at the BT rows from `first` on: before 0 of its state; zeros elsewhere."""
    rows = first + tl.arange(0, BT)
    at = (start + rows)[:, None].to(tl.int64) * D + d[None, :]
    inputs = tl.load(x + at, mask=((rows >= 0) & (rows < tokens))[:, None] & inside[None, :], other=0.0).to(ACC)
    if first < 0:
        at = (document * past + rows + past)[:, None] * D + d[None, :]
        given = ((rows < 0) & (rows >= -past))[:, None] & inside[None, :]
        inputs += tl.load(state + at, mask=given, other=0.0).to(ACC)
    return inputs


@triton.jit
def load_tap(weight, w, d, inside, W: tl.constexpr, ACC: tl.constexpr):
    """The filter's column w, `[BD]`."""
    return tl.load(weight + d * W + w, mask=inside, other=0.0).to(ACC)


@triton.jit
def convolve(
    x,
    weight,
    bias,
    state,
    first,
    start,
    tokens,
    past,
    document,
    d,
    inside,
    D,
    W: tl.constexpr,
    DILATION: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Sums before the activation at the BT rows from `first` on, `[BT,BD]`."""
    sums = tl.zeros((BT, BD), ACC)
    if bias is not None:
        sums += tl.load(bias + d, mask=inside, other=0.0).to(ACC)[None, :]
    for w in tl.static_range(W):
        shift = (W - 1 - w) * DILATION
        inputs = load_rows(x, state, first - shift, start, tokens, past, document, d, inside, D, ACC, BT)
        sums += inputs * load_tap(weight, w, d, inside, W, ACC)[None, :]
    return sums


@triton.jit
def place(pieces, boundaries):
    """Of this program's piece: its document, that one's first token and number of tokens, the piece's rows."""
    piece = tl.program_id(0)
    document = tl.load(pieces + 5 * piece).to(tl.int64)
    start = tl.load(boundaries + document)
    tokens = tl.load(boundaries + document + 1) - start
    return document, start, tokens, tl.load(pieces + 5 * piece + 1) - start, tl.load(pieces + 5 * piece + 2) - start


@triton.jit
def forward(
    x,
    weight,
    bias,
    state,
    out,
    final,
    pieces,
    boundaries,
    D,
    W: tl.constexpr,
    DILATION: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Outputs of a piece's tokens, and those of its rows that are the document's last inputs."""
    document, start, tokens, row, end = place(pieces, boundaries)
    past = (W - 1) * DILATION
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = d < D
    for i in range(tl.cdiv(end - row, BT)):
        top = row + i * BT
        rows = top + tl.arange(0, BT)
        here = (rows < end)[:, None] & inside[None, :]
        sums = convolve(
            x, weight, bias, state, top, start, tokens, past, document, d, inside, D, W, DILATION, ACC, BT, BD
        )
        if SILU:
            sums = sums * tl.sigmoid(sums)
        at = (start + rows)[:, None].to(tl.int64) * D + d[None, :]
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=(rows >= 0)[:, None] & here)
        if top + BT > tokens - past:
            kept = rows - tokens + past
            inputs = load_rows(x, state, top, start, tokens, past, document, d, inside, D, ACC, BT)
            at = (document * past + kept)[:, None] * D + d[None, :]
            tl.store(final + at, inputs.to(final.dtype.element_ty), mask=(kept >= 0)[:, None] & here)


@triton.jit
def load_d_sums(
    x,
    weight,
    bias,
    state,
    d_out,
    first,
    start,
    tokens,
    past,
    document,
    d,
    inside,
    D,
    W: tl.constexpr,
    DILATION: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradient of the sums at the BT rows from `first` on, 0 where there is no token; the sums are computed again."""
    rows = first + tl.arange(0, BT)
    mask = ((rows >= 0) & (rows < tokens))[:, None] & inside[None, :]
    at = (start + rows)[:, None].to(tl.int64) * D + d[None, :]
    d_sums = tl.load(d_out + at, mask=mask, other=0.0).to(ACC)
    if SILU:
        sums = convolve(
            x, weight, bias, state, first, start, tokens, past, document, d, inside, D, W, DILATION, ACC, BT, BD
        )
        gate = tl.sigmoid(sums)
        d_sums = d_sums * gate * (1 + sums * (1 - gate))
    return d_sums


@triton.jit
def backward(
    x,
    weight,
    bias,
    state,
    d_out,
    d_final,
    dx,
    d_state,
    d_weight,
    d_bias,
    pieces,
    boundaries,
    D,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    DILATION: tl.constexpr,
    SILU: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Gradients of a piece's rows, and its part of the weights' `[P,W,D]` and of the bias's `[P,D]`.

    TAPS: W, rounded up to a power of two.
    """
    document, start, tokens, row, end = place(pieces, boundaries)
    piece = tl.program_id(0).to(tl.int64)
    past = (W - 1) * DILATION
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = d < D
    tap = tl.arange(0, TAPS)[:, None]
    d_taps = tl.zeros((TAPS, BD), ACC)
    sum_d_sums = tl.zeros((BD,), ACC)
    for i in range(tl.cdiv(end - row, BT)):
        top = row + i * BT
        rows = top + tl.arange(0, BT)
        here = (rows < end)[:, None] & inside[None, :]
        grad = tl.zeros((BT, BD), ACC)
        d_sums = grad
        # From the last output reached to the row's own, whose gradient the weights need, too. Not unrolled: that
        # took more registers than there are.
        for w in range(W):
            later = top + (W - 1 - w) * DILATION
            d_sums = load_d_sums(
                x, weight, bias, state, d_out, later, start, tokens, past, document, d, inside, D, W, DILATION, SILU,
                ACC, BT, BD,
            )  # fmt: skip
            grad += d_sums * load_tap(weight, w, d, inside, W, ACC)[None, :]
        d_sums = tl.where(here, d_sums, 0.0)
        sum_d_sums += tl.sum(d_sums, 0)
        for w in range(W):
            shift = (W - 1 - w) * DILATION
            inputs = load_rows(x, state, top - shift, start, tokens, past, document, d, inside, D, ACC, BT)
            d_taps += tl.where(tap == w, tl.sum(d_sums * inputs, 0)[None, :], 0.0)
        if top + BT > tokens - past:
            kept = rows - tokens + past
            at = (document * past + kept)[:, None] * D + d[None, :]
            grad += tl.load(d_final + at, mask=(kept >= 0)[:, None] & here, other=0.0).to(ACC)
        at = (start + rows)[:, None].to(tl.int64) * D + d[None, :]
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=(rows >= 0)[:, None] & here)
        if top < 0:
            at = (document * past + rows + past)[:, None] * D + d[None, :]
            tl.store(d_state + at, grad.to(d_state.dtype.element_ty), mask=(rows < 0)[:, None] & here)
    tl.store(d_weight + (piece * W + tap) * D + d[None, :], d_taps, mask=(tap < W) & inside[None, :])
    tl.store(d_bias + piece * D + d, sum_d_sums, mask=inside)
