"""One long row with few heads, split in time so that all cores have work.

Blocks of value columns keep B H V / 16 threads busy at little cost. Beyond that, pieces of a row run in parallel from
zero states, which yields each as a map of its incoming state (`segments`): in the delta rule K more columns next to the
V. The state is taken through the maps one after another, and what each piece reads in its incoming state is added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape

# Fewer pieces do not pay for the maps, which cost up to the same work again.
LEAST_PIECES = 4
# Minimum chunks per piece; with fewer, the maps are no longer small compared to the tokens.
LEAST_CHUNKS = 8


def count_pieces(blocks: int, tokens: int, chunk: int) -> int:
    """Number of pieces to split each row of `tokens` tokens into, given `blocks` tasks without it; 1: no split."""
    pieces = min(_threads() // max(1, blocks), tokens // (LEAST_CHUNKS * chunk))
    return pieces if pieces >= LEAST_PIECES else 1


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def run_pieces(tensors: Sequence[Tensor | None], state: Tensor, scale: float, pieces: int) -> tuple[Tensor, Tensor]:
    """The recurrence over T tokens, a multiple of `pieces`.

    tensors: q, k, v, beta (None: linear attention) and log_decay, `[B,T,...]`. state: `[B,H,K,V]`.
    """
    # They use the operators, which use this.
    from seqtrain.kernels.delta_rule import delta_rule
    from seqtrain.kernels.linear_attention import linear_attention

    batch = state.shape[0]
    q, k, v, beta, log_decay = (x if x is None else x.unflatten(1, (pieces, -1)).flatten(0, 1) for x in tensors)
    segment = (
        linear_attention.segment([q, k, v, log_decay], {"scale": scale}, "native")
        if beta is None
        else delta_rule.segment([q, k, v, beta, log_decay], {"scale": scale}, "native")
    )
    transition, update = segment.transition()
    segment.local_output()
    updates = update.unflatten(0, (batch, pieces)).unbind(1)
    transitions = [None] * pieces if transition is None else transition.unflatten(0, (batch, pieces)).unbind(1)
    shape = AffineShape.of(updates[0].shape, None if transitions[0] is None else transitions[0].shape)
    before = []
    for factor, added in zip(transitions, updates, strict=True):
        before.append(state)
        whole = AffineMap(shape.transition(factor), shape.state(added)).apply(shape.state(state))
        state = whole.view_as(state)
    out = segment.add_incoming(torch.stack(before, 1).flatten(0, 1))
    return out.unflatten(0, (batch, pieces)).flatten(1, 2), state
