"""The short causal convolution as two Triton kernels, forward and backward.

A document is `past` inputs that were given, rows -past ... -1, and its tokens, rows 0 ...; both kernels go over pieces
of these rows, BT at a time, BD channels a program. Row r of the inputs reaches rows r, r+dilation, ... of the outputs.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(x, state, first, where, M: tl.constexpr):
    """Inputs of a document at the BT rows from `first` on: before 0 of its state; zeros elsewhere."""
    document, start, tokens, d, inside, D = where
    past = (M.W - 1) * M.DILATION
    rows = first + tl.arange(0, M.BT)
    at = (start + rows)[:, None].to(tl.int64) * D + d[None, :]
    inputs = tl.load(x + at, mask=((rows >= 0) & (rows < tokens))[:, None] & inside[None, :], other=0.0).to(M.ACC)
    if first < 0:
        at = (document * past + rows + past)[:, None] * D + d[None, :]
        given = ((rows < 0) & (rows >= -past))[:, None] & inside[None, :]
        inputs += tl.load(state + at, mask=given, other=0.0).to(M.ACC)
    return inputs


@triton.jit
def load_tap(weight, w, where, M: tl.constexpr):
    """The filter's column w, `[BD]`."""
    return tl.load(weight + where[3] * M.W + w, mask=where[4], other=0.0).to(M.ACC)


@triton.jit
def convolve(x, weight, bias, state, first, where, M: tl.constexpr):
    """Sums before the activation at the BT rows from `first` on, `[BT,BD]`."""
    sums = tl.zeros((M.BT, M.BD), M.ACC)
    if bias is not None:
        sums += tl.load(bias + where[3], mask=where[4], other=0.0).to(M.ACC)[None, :]
    W: tl.constexpr = M.W
    for w in tl.static_range(W):
        inputs = load_rows(x, state, first - (W - 1 - w) * M.DILATION, where, M)
        sums += inputs * load_tap(weight, w, where, M)[None, :]
    return sums


@triton.jit
def place(pieces, boundaries, D, M: tl.constexpr):
    """First and last row of this program's piece, and `where` it lies.

    That is: its document, that one's first token and number of tokens; channels, which of them there are, and D.
    """
    row = pieces + 5 * tl.program_id(0)
    document = tl.load(row).to(tl.int64)
    start = tl.load(boundaries + document)
    tokens = tl.load(boundaries + document + 1) - start
    d = tl.program_id(1) * M.BD + tl.arange(0, M.BD)
    return tl.load(row + 1) - start, tl.load(row + 2) - start, (document, start, tokens, d, d < D, D)


@triton.jit
def forward(x, weight, bias, state, out, final, pieces, boundaries, D, M: tl.constexpr):
    """Outputs of a piece's tokens, and those of its rows that are the document's last inputs."""
    row, end, where = place(pieces, boundaries, D, M)
    document, start, tokens, d, inside, _ = where
    past = (M.W - 1) * M.DILATION
    for i in range(tl.cdiv(end - row, M.BT)):
        top = row + i * M.BT
        rows = top + tl.arange(0, M.BT)
        here = (rows < end)[:, None] & inside[None, :]
        sums = convolve(x, weight, bias, state, top, where, M)
        if M.SILU:
            sums = sums * tl.sigmoid(sums)
        at = (start + rows)[:, None].to(tl.int64) * D + d[None, :]
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=(rows >= 0)[:, None] & here)
        if top + M.BT > tokens - past:
            kept = rows - tokens + past
            inputs = load_rows(x, state, top, where, M)
            at = (document * past + kept)[:, None] * D + d[None, :]
            tl.store(final + at, inputs.to(final.dtype.element_ty), mask=(kept >= 0)[:, None] & here)


@triton.jit
def load_d_sums(x, weight, bias, state, d_out, first, where, M: tl.constexpr):
    """Gradient of the sums at the BT rows from `first` on, 0 where there is no token; the sums are computed again."""
    _, start, tokens, d, inside, D = where
    rows = first + tl.arange(0, M.BT)
    mask = ((rows >= 0) & (rows < tokens))[:, None] & inside[None, :]
    at = (start + rows)[:, None].to(tl.int64) * D + d[None, :]
    d_sums = tl.load(d_out + at, mask=mask, other=0.0).to(M.ACC)
    if M.SILU:
        sums = convolve(x, weight, bias, state, first, where, M)
        gate = tl.sigmoid(sums)
        d_sums = d_sums * gate * (1 + sums * (1 - gate))
    return d_sums


@triton.jit
def backward(
    x, weight, bias, state, d_out, d_final, dx, d_state, d_weight, d_bias, pieces, boundaries, D, M: tl.constexpr
):
    """Gradients of a piece's rows, and its part of the weights' `[P,W,D]` and of the bias's `[P,D]`.

    TAPS: W, rounded up to a power of two.
    """
    row, end, where = place(pieces, boundaries, D, M)
    piece = tl.program_id(0).to(tl.int64)
    document, start, tokens, d, inside, _ = where
    past = (M.W - 1) * M.DILATION
    tap = tl.arange(0, M.TAPS)[:, None]
    d_taps = tl.zeros((M.TAPS, M.BD), M.ACC)
    sum_d_sums = tl.zeros((M.BD,), M.ACC)
    for i in range(tl.cdiv(end - row, M.BT)):
        top = row + i * M.BT
        rows = top + tl.arange(0, M.BT)
        here = (rows < end)[:, None] & inside[None, :]
        grad = tl.zeros((M.BT, M.BD), M.ACC)
        d_sums = grad
        # From the last output reached to the row's own, whose gradient the weights need, too. Not unrolled: that
        # took more registers than there are.
        for w in range(M.W):
            later = top + (M.W - 1 - w) * M.DILATION
            d_sums = load_d_sums(x, weight, bias, state, d_out, later, where, M)
            grad += d_sums * load_tap(weight, w, where, M)[None, :]
        d_sums = tl.where(here, d_sums, 0.0)
        sum_d_sums += tl.sum(d_sums, 0)
        for w in range(M.W):
            shift = (M.W - 1 - w) * M.DILATION
            inputs = load_rows(x, state, top - shift, where, M)
            d_taps += tl.where(tap == w, tl.sum(d_sums * inputs, 0)[None, :], 0.0)
        if top + M.BT > tokens - past:
            kept = rows - tokens + past
            at = (document * past + kept)[:, None] * D + d[None, :]
            grad += tl.load(d_final + at, mask=(kept >= 0)[:, None] & here, other=0.0).to(M.ACC)
        at = (start + rows)[:, None].to(tl.int64) * D + d[None, :]
        tl.store(dx + at, grad.to(dx.dtype.element_ty), mask=(rows >= 0)[:, None] & here)
        if top < 0:
            at = (document * past + rows + past)[:, None] * D + d[None, :]
            tl.store(d_state + at, grad.to(d_state.dtype.element_ty), mask=(rows < 0)[:, None] & here)
    tl.store(d_weight + (piece * M.W + tap) * D + d[None, :], d_taps, mask=(tap < M.W) & inside[None, :])
    tl.store(d_bias + piece * D + d, sum_d_sums, mask=inside)
