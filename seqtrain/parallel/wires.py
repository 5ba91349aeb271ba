"""Messages between the ranks of a group as schedules and exchanges see them: by streams, by gloo, by NCCL.

A *place* is a rank's position along a scan: ranks counted forwards, or from the last one backwards.
"""

import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.parallel.streams import Arrival, Leaving, Streams

Sent = list[tuple[dist.Work | Leaving, Tensor]]
# A thread waits for a scan, or for an exchange of messages; a scan runs, on whichever thread.
Event = Literal["scan", "exchange", "run"]
Observer = Callable[[Event], AbstractContextManager[object]]
_observers: list[Observer] = []


@contextmanager
def observed_by(observer: Observer) -> Iterator[None]:
    """For profilers: while open, `observer(event)` is entered around every event on any thread of this process."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def observed(event: Event) -> AbstractContextManager[object]:
    """What a profiler has entered around an event, see `observed_by`."""
    # One at a time is told: the latest.
    return _observers[-1](event) if _observers else nullcontext()


class Wire(ABC):
    """Messages between the ranks of a group, addressed by place. Buffers are contiguous."""

    # Ranks whose maps forget, see `AffineMap`.
    resets: Sequence[int] = ()

    def __init__(self, group: dist.ProcessGroup, reverse: bool = False):
        self.group = group
        self.places = group.size()
        self.reverse = reverse
        self.place = self.rank(group.rank())
        self.receives: deque[Any] = deque()
        self.sends: list[Any] = []

    def rank(self, place: int) -> int:
        """The rank in the group at a place (and the place of a rank)."""
        return self.places - 1 - place if self.reverse else place

    def forget(self, *places: int) -> bool:
        """Whether the map of one of these places forgets the state that enters it, and so their composition does."""
        return any(self.rank(place) in self.resets for place in places)

    def post(self, buffer: Tensor, place: int) -> None:
        """Announces that a message from `place` is to fill `buffer`; messages arrive in the order of posting."""
        _check_contiguous(buffer)
        self.receives.append(self._message("recv", buffer, self.rank(place)))

    def send(self, buffer: Tensor, place: int) -> None:
        """Sends `buffer`, which must stay untouched until the works that `close` returns are done."""
        _check_contiguous(buffer)
        self.sends.append(self._message("send", buffer, self.rank(place)))

    def post_all(self, arrivals: Tensor, messages: Sequence[tuple[int, int]]) -> None:
        """`post` for messages that fill `arrivals` one after the other: from which place, and how many numbers."""
        for buffer, (place, _) in zip(arrivals.split([numbers for _, numbers in messages]), messages, strict=True):
            self.post(buffer, place)

    @abstractmethod
    def receive(self, count: int = 1) -> None:
        """Waits until the next `count` posted buffers are filled."""

    @abstractmethod
    def close(self) -> Sent:
        """The sends that may still be under way, with the buffers they read."""

    @abstractmethod
    def _message(self, what: str, buffer: Tensor, rank: int) -> Any:
        """What `receives` or `sends` holds of a message; `what`: "recv" or "send"."""


class StreamWire(Wire):
    """One scan on CPUs, in streams; from each place all that comes fills one piece of memory."""

    def __init__(self, group: dist.ProcessGroup, streams: Streams, number: int, agreed: str, reverse: bool):
        super().__init__(group, reverse)
        self.streams = streams
        self._names = number, zlib.crc32(agreed.encode())

    def post_all(self, arrivals: Tensor, messages: Sequence[tuple[int, int]]) -> None:
        found: dict[int, Arrival] = {}
        start, item = 0, arrivals.element_size()
        for place, numbers in messages:
            arrival = found.get(place)
            if arrival is None:
                arrival = found[place] = self.streams.arrival(*self._names, self.rank(place), arrivals, start)
            assert start == arrival.start + arrival.size, "what one place sends in a scan fills one piece of memory"
            arrival.size += item * numbers
            start += item * numbers
            self.receives.append((arrival, arrival.size))
        self.streams.post(found.values())

    def receive(self, count: int = 1) -> None:
        for _ in range(count):
            self.streams.receive(*self.receives.popleft())

    def close(self) -> Sent:
        return [sent for sent in self.sends if sent[0] is not None]

    def _message(self, what: str, buffer: Tensor, rank: int) -> tuple[Leaving | None, Tensor]:
        assert what == "send", "a scan posts all it receives at once"
        return self.streams.send(*self._names, buffer, rank), buffer


class ExchangeWire(Wire):
    """Messages outside the scans, for which the caller waits."""

    def receive_exchange(self, count: int = 1) -> None:
        """`receive`, which profilers are told of."""
        with observed("exchange"):
            self.receive(count)

    @abstractmethod
    def launch(self) -> Sent:
        """Lets what was posted and sent go while the caller computes."""

    def wait(self, launched: Sent) -> None:
        """Until what `launch` gave has come, and its sends have left."""
        with observed("exchange"):
            for work, _ in launched:
                work.wait()


class GlooWire(ExchangeWire):
    """gloo: a receive is posted at once (a late one costs one more latency), a send leaves when it is called.

    `tag`: two peers that disagree about what is sent never match, where gloo would abort the process on a message of
    another size. The group's own methods are used: `dist.isend` adds 30 us per message.
    """

    def __init__(self, group: dist.ProcessGroup, tag: int, reverse: bool = False):
        super().__init__(group, reverse)
        self.tag = tag

    def receive(self, count: int = 1) -> None:
        for _ in range(count):
            self.receives.popleft()[0].wait()

    def launch(self) -> Sent:
        launched = [*self.receives, *self.sends]
        self.receives.clear()
        self.sends = []
        return launched

    def close(self) -> Sent:
        sends, self.sends = self.sends, []
        return sends

    def _message(self, what: str, buffer: Tensor, rank: int) -> tuple[dist.Work, Tensor]:
        return getattr(self.group, what)([buffer], rank, self.tag), buffer


class NcclWire(ExchangeWire):
    """NCCL: sends wait for the next receives and go with them as one batch, on the current stream.

    NCCL has no tags and one queue per communicator: a send queued before the receive it depends on, on both peers,
    would serialize or deadlock, and a receive posted early would hold up every send after it.
    """

    def receive(self, count: int = 1) -> None:
        for work, _ in self._batch(count):
            work.wait()  # orders the current stream after the messages; the host continues

    def launch(self) -> Sent:
        # NCCL runs it on a stream of its own, behind what the current one was given so far.
        return self._batch(len(self.receives))

    def _batch(self, receives: int) -> Sent:
        operations = [*self.sends, *(self.receives.popleft() for _ in range(receives))]
        self.sends = []
        works = dist.batch_isend_irecv(operations) if operations else []
        return [(work, operation.tensor) for work, operation in zip(works, operations, strict=False)]

    def close(self) -> Sent:
        self.receive(0)
        return []

    def _message(self, what: str, buffer: Tensor, rank: int) -> dist.P2POp:
        # NCCL has no complex numbers.
        buffer = torch.view_as_real(buffer) if buffer.is_complex() else buffer
        return dist.P2POp(dist.isend if what == "send" else dist.irecv, buffer, None, self.group, group_peer=rank)


def _check_contiguous(buffer: Tensor) -> None:
    # gloo rejects others on the rank that has one, and the others then die by time-out.
    assert buffer.is_contiguous(), f"a message must be contiguous, has strides {buffer.stride()} for {buffer.shape}"
