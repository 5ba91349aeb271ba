"""Messages between the ranks of a group outside of scans: flat tensors between all of them, each pair with its size.

Halos, messages between those that have something for each other, and all-to-alls, one collective, are made of it. It is
its own gradient with the sizes swapped, so that what a rank was sent tells it which gradients to send back.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.parallel.scan import COMMUNICATE
from seqtrain.parallel.scan_engine import engine_of

# How many exchanges a rank may be ahead of those it sends to; a layer has a few, and each holds a copy meanwhile.
EXCHANGES_IN_FLIGHT = 16


def exchange(
    pieces: Tensor,
    to: Sequence[int],
    come: Sequence[int],
    *,
    group: dist.ProcessGroup,
    agreed: str,
    run_ahead: bool = False,
) -> Tensor:
    """Sends the next `to[r]` numbers of `pieces` to each rank r and returns what came, in the order of ranks.

    Without `run_ahead` it is one `all_to_all_single`: gloo and NCCL then move all pieces at once, and know that all
    ranks take part. Where sizes disagree gloo ends the process.

    Args:
        pieces: `[sum(to)]`, any dtype; the piece for this rank itself is copied.
        to, come: how many numbers go to and come from each rank of the group; no message where there are none.
        group: every rank of it calls, in the same order of exchanges, and all ask for gradients or none does. The loss
            of every rank must depend on the result, see `keep_in_graph`.
        agreed: a text that is the same on every rank and different where sizes would be: ranks that disagree about
            messages get an error after the group's time-out.
        run_ahead: as messages between the ranks that have something for each other. It returns before what was sent
            has left this rank, which takes a copy. Without it a rank waits until those it sends to are there too.

    Returns `[sum(come)]`, differentiable. Bytes: what `to` and `come` say, forward; the same backward.
    """
    assert pieces.shape == (sum(to),), (pieces.shape, to)
    agreed = f"{agreed} {pieces.dtype}"
    return torch.ops.seqtrain.exchange(pieces, to, come, agreed, group.group_name, run_ahead)


@torch.library.custom_op("seqtrain::exchange", mutates_args=())
def _exchange(
    pieces: Tensor, to: Sequence[int], come: Sequence[int], agreed: str, group_name: str, run_ahead: bool
) -> Tensor:
    engine = engine_of(group_name)
    arrived = pieces.new_empty(sum(come))
    if not run_ahead:
        engine.all_to_all(arrived, pieces.contiguous(), come, to, agreed)
        return arrived
    leaving, arriving = pieces.clone().split(list(to)), arrived.split(list(come))
    with engine.messages(agreed, pieces.device, in_flight=EXCHANGES_IN_FLIGHT) as wire:
        # Receives first: a message that finds none waiting costs one more latency.
        senders = [peer for peer, numbers in enumerate(come) if numbers and peer != engine.rank]
        for peer in senders:
            wire.post(arriving[peer], peer)
        # The next rank first, so that not all send to the same one at once.
        for peer in (*range(engine.rank + 1, len(to)), *range(engine.rank)):
            if to[peer]:
                wire.send(leaving[peer], peer)
        arriving[engine.rank].copy_(leaving[engine.rank])
        wire.receive_exchange(len(senders))
    return arrived


@_exchange.register_fake
def _(pieces, to, come, agreed, group_name, run_ahead):
    return pieces.new_empty(sum(come))


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.to, ctx.come, ctx.agreed, ctx.group_name, ctx.run_ahead = inputs


def _exchange_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    back = torch.ops.seqtrain.exchange(
        gradient, ctx.come, ctx.to, f"{ctx.agreed} backward", ctx.group_name, ctx.run_ahead
    )
    return back, None, None, None, None, None


_exchange.register_autograd(_exchange_gradients, setup_context=_remember)

COMMUNICATE.add(torch.ops.seqtrain.exchange.default)
