"""Point-to-point messages of one scan: receives are posted early, sends never block."""

from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Sent = list[tuple[dist.Work, Tensor]]


class Wire(Protocol):
    """Messages between the ranks of one group for one scan. Buffers are contiguous; ranks are those of the group."""

    def post(self, buffer: Tensor, rank: int) -> None:
        """Announces that `buffer` is to be filled by a message from `rank`; messages arrive in the order of posting."""

    def send(self, buffer: Tensor, rank: int) -> None:
        """Sends `buffer`, which must stay untouched until the works that `close` returns are done."""

    def receive(self, count: int = 1) -> list[Tensor]:
        """Waits for the next `count` posted buffers and returns them."""

    def close(self) -> Sent:
        """The sends that may still be under way, with the buffers they read."""


class GlooWire:
    """gloo: a receive is posted at once (a late one costs one more latency), a send leaves when it is called.

    `tag` names the scan: two peers that disagree about which scan this is never match, where gloo would abort the
    process on a message of another size. The group's own methods are used: `dist.isend` adds 30 us a message.
    """

    def __init__(self, group: dist.ProcessGroup, tag: int):
        self.group = group
        self.tag = tag
        self.receives: deque[tuple[dist.Work, Tensor]] = deque()
        self.sends: Sent = []

    def post(self, buffer: Tensor, rank: int) -> None:
        _check(buffer)
        self.receives.append((self.group.recv([buffer], rank, self.tag), buffer))

    def send(self, buffer: Tensor, rank: int) -> None:
        _check(buffer)
        self.sends.append((self.group.send([buffer], rank, self.tag), buffer))

    def receive(self, count: int = 1) -> list[Tensor]:
        arrived = []
        for _ in range(count):
            work, buffer = self.receives.popleft()
            work.wait()
            arrived.append(buffer)
        return arrived

    def close(self) -> Sent:
        sends, self.sends = self.sends, []
        return sends


class NcclWire:
    """NCCL: sends wait for the next receives and go with them as one batch, on the current stream.

    NCCL has no tags and one queue a communicator: a send queued before the receive it depends on, on both peers, would
    serialise or deadlock, and a receive posted early would hold up every send behind it.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.receives: deque[tuple[Tensor, int]] = deque()
        self.sends: deque[tuple[Tensor, int]] = deque()

    def post(self, buffer: Tensor, rank: int) -> None:
        _check(buffer)
        self.receives.append((buffer, rank))

    def send(self, buffer: Tensor, rank: int) -> None:
        _check(buffer)
        self.sends.append((buffer, rank))

    def receive(self, count: int = 1) -> list[Tensor]:
        arriving = [self.receives.popleft() for _ in range(count)]
        self._batch(arriving)
        return [buffer for buffer, _ in arriving]

    def close(self) -> Sent:
        self._batch([])
        return []

    def _batch(self, arriving: list[tuple[Tensor, int]]) -> None:
        operations = [
            # NCCL has no complex numbers.
            dist.P2POp(
                operation,
                torch.view_as_real(buffer) if buffer.is_complex() else buffer,
                None,
                self.group,
                group_peer=rank,
            )
            for operation, messages in ((dist.isend, self.sends), (dist.irecv, arriving))
            for buffer, rank in messages
        ]
        self.sends.clear()
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()  # orders the current stream behind the messages; the host goes on


def _check(buffer: Tensor) -> None:
    # gloo rejects a non-contiguous tensor on one rank, and the others then die by time-out.
    assert buffer.is_contiguous(), f"a message must be contiguous, has strides {buffer.stride()} for {buffer.shape}"
