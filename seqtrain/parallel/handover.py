"""States between rows that continue each other, each sharded over the same ranks: the last has what the first needs."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.sequence import with_gradients


@torch.no_grad()
def states_to_first(states: Any, group: dist.ProcessGroup) -> Any:
    """The last rank's `states`, without their graph, as `ShardedSequence` takes them for a row that continues this one.

    `states`: any nesting of tensors `[1,...]`, those after each rank's own tokens. Whole numbers go to every rank; of
    the rest the first has the values, and others zeros that take no memory. A collective of `group`.
    """
    parts, structure = tree_flatten(states)
    shapes = _shapes(parts, group)
    came = _move(parts, shapes, sender=group.size() - 1, receiver=0, group=group)
    found = [
        part.new_zeros(()).expand(shape) if moved is None else moved
        for part, shape, moved in zip(parts, shapes, came, strict=True)
    ]
    return tree_unflatten(found, structure)


@torch.no_grad()
def gradients_to_last(leaves: Any, states: Any, group: dist.ProcessGroup) -> list[Tensor]:
    """Gradients of `with_gradients(states)`, on the last rank those of `leaves`, on others zeros.

    `leaves`: what `states_to_first` made of `states`. A collective of `group`.
    """
    given, own = with_gradients(leaves), with_gradients(states)
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in given]
    came = _move(gradients, [leaf.shape for leaf in given], sender=0, receiver=group.size() - 1, group=group)
    return [
        state.new_zeros(()).expand(state.shape) if moved is None else moved
        for state, moved in zip(own, came, strict=True)
    ]


def _shapes(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[torch.Size]:
    """Those of the last rank: how many rows a window holds differs from rank to rank."""
    told = torch.tensor([size for part in parts for size in part.shape], device=parts[0].device)
    [came] = _move([told], [told.shape], sender=group.size() - 1, receiver=0, group=group)
    assert came is not None, "whole numbers go to every rank"
    sizes = iter(came.tolist())
    return [torch.Size(next(sizes) for _ in part.shape) for part in parts]


def _move(
    parts: Sequence[Tensor], shapes: Sequence[torch.Size], *, sender: int, receiver: int, group: dist.ProcessGroup
) -> list[Tensor | None]:
    """What `sender` has of each part, which there is of these shapes; None where this rank isn't given it."""
    rank, ranks = group.rank(), range(group.size())
    found: list[Tensor | None] = [None] * len(parts)
    for dtype in dict.fromkeys(part.dtype for part in parts):
        places = [place for place, part in enumerate(parts) if part.dtype == dtype]
        sizes = [shapes[place].numel() for place in places]
        # Every rank needs to know how many tokens there were.
        receivers = (receiver,) if dtype.is_floating_point or dtype.is_complex else ranks
        leaving = [sum(sizes) * (rank == sender and peer in receivers) for peer in ranks]
        coming = [sum(sizes) * (rank in receivers and peer == sender) for peer in ranks]
        own = [parts[place].reshape(-1) for place in places] if any(leaving) else [parts[places[0]].new_empty(0)]
        pieces = torch.cat(own).repeat(len(receivers))
        came = exchange(pieces, leaving, coming, group=group, agreed=f"states {sum(sizes)}", run_ahead=True)
        if rank in receivers:
            for place, numbers in zip(places, came.split(sizes), strict=True):
                found[place] = numbers.view(shapes[place])
    return found
