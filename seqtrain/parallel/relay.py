"""A state handed from rank to rank: how an operator is run over a cut sequence when nothing more is known of it.

Exact for every operator whose state is all it knows of the past, and slow: while one rank computes the next one waits.
"""

import logging
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.local_call import LocalCall, tie

log = logging.getLogger("seqtrain.parallel")


def run_relayed(call: LocalCall, initial_state: Any) -> tuple[Tensor, Any]:
    """`(out, final_state)` of `call` in a row cut over its group, each rank waiting for the state of the one before.

    The operator's state is a tensor, or any nesting of tensors, `[B,...]`, whose shapes do not depend on the tokens
    seen; given no tokens the operator returns the state of an empty past, or the one it was given.
    """
    _warn(call.operator.name)
    pieces, rank, ranks = call.pieces, call.group.rank(), call.group.size()
    tail = call.tail().run(cu_seqlens=pieces.tail) if pieces.head < pieces.tokens else None
    # Whatever is sent or received hangs on an input, so that gradients come this way on every rank or on none.
    anchor = call.tensors[0]
    state = _receive(call.nothing().run()[1], rank, anchor, call.group) if rank else initial_state
    outs = []
    if tail is None or pieces.head:
        out, after = call.head().run(initial_state=state)
        outs.append(out)
    if tail is not None:
        out, after = tail[0], tree_map(lambda states: states[-call.batch :], tail[1])
        outs.append(out)
    owed = tree_flatten(state)[0] if rank else []
    if rank + 1 < ranks:
        owed += [_send(part, name, rank + 1, anchor, call.group) for name, part in enumerate(tree_flatten(after)[0])]
    return tie(torch.cat(outs, 1), *owed), after


def _send(part: Tensor, name: int, rank: int, anchor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sends a part of the state to `rank`. Gradients return where the loss depends on the result, of no numbers."""
    sizes = [part.numel() if peer == rank else 0 for peer in range(group.size())]
    pieces = part.flatten()
    if part.is_floating_point() or part.is_complex():
        pieces = tie(pieces, anchor)
    return exchange(pieces, sizes, [0] * group.size(), group=group, agreed=_agreed(part, name, rank), run_ahead=True)


def _receive(like: Any, rank: int, anchor: Tensor, group: dist.ProcessGroup) -> Any:
    """The state, like `like`, that the rank before `rank` sends."""
    parts, structure = tree_flatten(like)
    came = []
    for name, part in enumerate(parts):
        nothing = part.new_empty(0)
        if part.is_floating_point() or part.is_complex():
            nothing = tie(nothing, anchor)
        sizes = [part.numel() if peer == rank - 1 else 0 for peer in range(group.size())]
        agreed = _agreed(part, name, rank)
        arrived = exchange(nothing, [0] * group.size(), sizes, group=group, agreed=agreed, run_ahead=True)
        came.append(arrived.view(part.shape))
    return tree_unflatten(came, structure)


def _agreed(part: Tensor, name: int, rank: int) -> str:
    return f"relay to {rank}: part {name} {tuple(part.shape)}"


@cache
def _warn(operator: str) -> None:
    log.warning(
        "%s: its segments are no affine maps, so ranks that share a sequence compute one after another", operator
    )
