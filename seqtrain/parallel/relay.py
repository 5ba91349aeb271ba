"""A state handed from rank to rank: how an operator is run over a sharded sequence when nothing more is known of it.

Exact for every operator whose state is all it knows of the past, and slow: while one rank computes the next one waits.
"""

import logging
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from seqtrain.kernels.segments import Relayed
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.scan import keep_in_graph
from seqtrain.parallel.sequence import Call, SplitInTime, splits
from seqtrain.parallel.sharded import ShardedSequence

log = logging.getLogger("seqtrain.parallel")


@splits(Relayed)
class RelayedState(SplitInTime):
    """Each rank waits for the state of the one before.

    The operator's state is a tensor, or any nesting of tensors, `[B,...]`, whose shapes do not depend on the tokens
    seen; given no tokens the operator returns the state of an empty past, or the one it was given.
    """

    def sharded(self, sequence: ShardedSequence, call: Call) -> tuple[Tensor, Any]:
        _warn(call.operator.name)
        tokens = sequence.end - sequence.start
        head, documents = sequence.head_and_tail(call.initial_state is not None)
        # Whatever is sent or received hangs on an input, so that gradients come this way on every rank or on none.
        group, anchor = sequence.group, call.tensors[0]
        rank, batch = group.rank(), anchor.shape[0]
        tail = call.rows(slice(head, tokens)).run(sequence, None, documents) if head < tokens else None
        like = call.rows(slice(0, 0)).run(sequence, None, None)[1] if rank else None
        state = _receive(like, rank, anchor, group) if rank else call.initial_state
        outs = []
        if tail is None or head:
            out, after = call.rows(slice(0, head)).run(sequence, state, None)
            outs.append(out)
        if tail is not None:
            out, after = tail[0], tree_map(lambda states: states[-batch:], tail[1])
            outs.append(out)
        owed = tree_flatten(state)[0] if rank else []
        if rank + 1 < group.size():
            # Gradients return where the loss depends on what comes of sending: no numbers.
            owed += [
                _pass_on(part.flatten(), 0, part, f"to {rank + 1}: part {name}", rank + 1, anchor, group)
                for name, part in enumerate(tree_flatten(after)[0])
            ]
        return keep_in_graph(torch.cat(outs, 1), *owed), after


def _receive(like: Any, rank: int, anchor: Tensor, group: dist.ProcessGroup) -> Any:
    """The state, like `like`, that the rank before `rank` sends."""
    parts, structure = tree_flatten(like)
    came = [
        _pass_on(part.new_empty(0), part.numel(), part, f"to {rank}: part {name}", rank - 1, anchor, group)
        for name, part in enumerate(parts)
    ]
    return tree_unflatten([numbers.view(part.shape) for numbers, part in zip(came, parts, strict=True)], structure)


def _pass_on(
    numbers: Tensor, comes: int, part: Tensor, what: str, peer: int, anchor: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Sends `numbers` to `peer` and returns the `comes` numbers that it sends."""
    if part.is_floating_point() or part.is_complex():
        numbers = keep_in_graph(numbers, anchor)
    sizes = [[count * (each == peer) for each in range(group.size())] for count in (numbers.numel(), comes)]
    return exchange(numbers, *sizes, group=group, agreed=f"relay {what} {tuple(part.shape)}", run_ahead=True)


@cache
def _warn(operator: str) -> None:
    log.warning("%s: not an affine recurrence: sequence-parallel ranks run one after another", operator)
