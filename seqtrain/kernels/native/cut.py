"""One long row with few heads, cut in time so that all cores have work.

Blocks of value columns keep B H V / 16 threads busy at little cost. Beyond that, pieces of a row run side by side from
zero states, which yields each as a map of the state that comes in (`segments`): in the delta rule K more columns beside
the V. The states go through the maps one after another, and what a piece reads in the state before it is added.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape

# Fewer pieces do not win back what the maps cost: up to twice the work.
LEAST_PIECES = 4
# Chunks in a piece at least; of fewer, the maps are no longer small beside the tokens.
LEAST_CHUNKS = 8


def count_pieces(blocks: int, tokens: int, chunk: int) -> int:
    """Into how many pieces to cut each row of `tokens` tokens, where there are `blocks` tasks without; 1: none."""
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
