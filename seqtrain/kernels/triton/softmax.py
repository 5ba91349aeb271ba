"""The softmax of a cross-entropy as a Triton kernel: the loss of every row, and its gradient in the logits' place."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy(logits, labels, losses, vocab, M: tl.constexpr):
    """One row of logits `[n,vocab]`: `-log softmax(row)[label]`, 0 for IGNORED; with GRADIENT it replaces the row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    counted = label != M.IGNORED
    logits += row * vocab
    column = tl.arange(0, M.BV)
    # The largest so far and the sum of exponentials relative to it, a number a lane.
    highest = tl.full((M.BV,), -float("inf"), M.ACC)
    total = tl.zeros((M.BV,), M.ACC)
    for start in range(0, vocab, M.BV):
        x = tl.load(logits + start + column, mask=start + column < vocab, other=-float("inf")).to(M.ACC)
        higher = tl.maximum(highest, x)
        # A lane without a number yet stays at zero: -inf less -inf would be NaN.
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(highest - base) + tl.exp(x - base)
        highest = higher
    peak = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - peak), 0)
    chosen = tl.load(logits + label, mask=counted, other=0.0).to(M.ACC)
    tl.store(losses + row, tl.where(counted, tl.log(total) + peak - chosen, 0.0))
    if M.GRADIENT:
        for start in range(0, vocab, M.BV):
            inside = start + column < vocab
            x = tl.load(logits + start + column, mask=inside, other=-float("inf")).to(M.ACC)
            d_x = tl.exp(x - peak) / total - tl.where(start + column == label, 1.0, 0.0)
            d_x = tl.where(counted, d_x, 0.0)
            tl.store(logits + start + column, d_x.to(logits.dtype.element_ty), mask=inside)
