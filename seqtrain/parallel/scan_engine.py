"""Runs the scans of one process group: in order, on a thread of its own, so that they advance while a rank computes.

Receives are posted early, sends never block. A *place* is a rank's position along a scan: ranks counted forwards, or
from the last one backwards.
"""

import itertools
import queue
import threading
import zlib
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape

if TYPE_CHECKING:
    from seqtrain.parallel.schedules.base import Schedule
    from seqtrain.parallel.schedules.links import Costs

# Sends are waited for this many scans later: a rank may run ahead of a slow neighbor by as many layers.
SCANS_IN_FLIGHT = 4
# Scans are told apart on the wire by a tag: this bit keeps clear of small tags of others, then 16 bits of what peers
# must agree on (a disagreement about shapes never matches) and 12 bits of sequence number.
TAG_BASE = 1 << 30
# Messages outside scans have this bit instead, and a sequence number per agreed text.
EXCHANGE_TAG = 1 << 29

Sent = list[tuple[dist.Work, Tensor]]
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


def _observed(event: Event) -> AbstractContextManager[object]:
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
        self.receives.append(self._message("recv", buffer, self.rank(place)))

    def send(self, buffer: Tensor, place: int) -> None:
        """Sends `buffer`, which must stay untouched until the works that `close` returns are done."""
        self.sends.append(self._message("send", buffer, self.rank(place)))

    @abstractmethod
    def receive(self, count: int = 1) -> None:
        """Waits until the next `count` posted buffers are filled."""

    def receive_exchange(self, count: int = 1) -> None:
        """`receive` for messages outside the scans."""
        with _observed("exchange"):
            self.receive(count)

    @abstractmethod
    def launch(self) -> Sent:
        """Lets what was posted and sent go while the caller computes."""

    def wait(self, launched: Sent) -> None:
        """Until what `launch` gave has come, and its sends have left."""
        with _observed("exchange"):
            for work, _ in launched:
                work.wait()

    @abstractmethod
    def close(self) -> Sent:
        """The sends that may still be under way, with the buffers they read."""

    @abstractmethod
    def _message(self, what: str, buffer: Tensor, rank: int) -> Any:
        """What `receives` or `sends` holds of a message; `what`: "recv" or "send"."""


class GlooWire(Wire):
    """gloo: a receive is posted at once (a late one costs one more latency), a send leaves when it is called.

    `tag` names the scan: two peers that disagree about which scan this is never match, where gloo would abort the
    process on a message of another size. The group's own methods are used: `dist.isend` adds 30 us per message.
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
        # gloo rejects a non-contiguous tensor on one rank, and the others then die by time-out.
        assert buffer.is_contiguous(), f"a message must be contiguous, has strides {buffer.stride()} for {buffer.shape}"
        return getattr(self.group, what)([buffer], rank, self.tag), buffer


class NcclWire(Wire):
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


class Job:
    """One scan: opened (receives posted), started (own map known), finished."""

    def __init__(self, plan: "Schedule", shape: AffineShape, wire: Wire, arrivals: Tensor):
        self.plan = plan
        self.shape = shape
        self.wire = wire
        self.arrivals = arrivals
        self.inputs: tuple[AffineMap, Tensor | None] | None = None
        self.done = threading.Event()
        self.states: tuple[Tensor, Tensor] | None = None
        self.failure: Exception | None = None
        self.stream: torch.cuda.Stream | None = None
        # A scan of gradients carries the incoming state of its forward scan and the final state's own gradient.
        self.forward: tuple[Tensor, Tensor | None] | None = None

    @property
    def forgets(self) -> bool:
        """Whether this rank's map forgets the state that enters it."""
        return self.wire.forget(self.wire.place)

    def run(self) -> Sent:
        """Sends and receives; returns the sends that may still be under way."""
        assert self.inputs is not None, "a scan runs once, after it was given its map"
        own, first = self.inputs
        self.inputs = None
        with torch.no_grad(), _observed("run"):
            if self.wire.place:
                first = None
            elif first is None:
                first = torch.zeros_like(own.update, memory_format=torch.contiguous_format)
            else:  # results are the caller's, who may write to them
                first = first.clone(memory_format=torch.contiguous_format)
            self.states = self.plan.run(self.wire, self.shape, own, first, self.arrivals)
            return self.wire.close()

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits, then `(incoming, outgoing)` state, `[rows, depth, columns]`; `RuntimeError` if the scan failed."""
        with _observed("scan"):
            self.done.wait()
        if self.failure is not None:
            raise RuntimeError(
                f"all_scan failed at place {self.wire.place} of {self.wire.places} ({self.plan.name}, {self.shape}): "
                f"a rank has left, or ranks disagree about the scan: {self.failure}"
            ) from self.failure
        assert self.states is not None, "a finished scan has its states"
        if self.stream is not None:
            current = torch.cuda.current_stream(self.arrivals.device)
            current.wait_stream(self.stream)
            for state in self.states:
                state.record_stream(current)
        return self.states


class Engine:
    """The scans of one process group, on this rank. All ranks must open their scans in the same order.

    `in_line`: scans and messages run when and where they are asked for, on GPUs in the stream that computes; on CPUs as
    NCCL has them, in batches and without tags. Else scans advance while the rank computes.
    """

    in_line = False

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank = group.rank()
        self.size = group.size()
        self.costs: Costs | None = None  # what scans cost here, once measured
        self.scans = 0  # for callers' use: how many of those opened were asked for by a model
        self.exchanges = 0  # likewise: how many times `messages` or `all_to_all` was asked for
        self._opened = 0
        self._numbers: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._sent: deque[Sent] = deque()
        self._lent: deque[Sent] = deque()
        self._queue: queue.SimpleQueue[Job | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def open(
        self,
        plan: "Schedule",
        shape: AffineShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        reverse: bool = False,
        resets: Sequence[int] = (),
    ) -> Job:
        """Posts the receives of the next scan. `device`: where its tensors live; `resets`: ranks whose maps forget."""
        self._check_alive()
        with self._lock:
            number = self._opened
            self._opened += 1
            if device.type == "cuda" or self.in_line:
                wire: Wire = NcclWire(self.group, reverse)
            else:
                agreed = _signature(f"{plan} {shape} {dtype} {reverse} {list(resets)}")
                wire = GlooWire(self.group, TAG_BASE | agreed << 12 | number & 0xFFF, reverse)
            wire.resets = resets
            messages = plan.receives(shape, wire.place, wire.places)
            arrivals = torch.empty(sum(m.numbers for m in messages), dtype=dtype, device=device)
            for buffer, message in zip(arrivals.split([m.numbers for m in messages]), messages, strict=True):
                wire.post(buffer, message.place)
        return Job(plan, shape, wire, arrivals)

    def start(self, job: Job, own: AffineMap, first: Tensor | None) -> None:
        """Lets the scan run. `own`: this rank's map; `first`: the state before place 0, which only place 0 reads."""
        job.inputs = (own, first)
        if job.arrivals.is_cuda and not self.in_line:
            self._start_on_stream(job, own, first)
        elif job.plan.blocking or self.in_line or self.size == 1:
            self._run(job)
        else:
            if self._thread is None:
                name = f"all_scan {self.group.group_name}"
                self._thread = threading.Thread(target=self._progress, name=name, daemon=True)
                self._thread.start()
            self._queue.put(job)

    def flush(self) -> None:
        """Waits until every started scan has run and every message of this rank has left it."""
        with _observed("scan"):
            if self._thread is not None:
                reached = threading.Event()
                self._queue.put(reached)
                reached.wait()
            self._settle(self._sent, 0)
            self._settle(self._lent, 0)

    @contextmanager
    def messages(self, agreed: str, device: torch.device, *, in_flight: int = 0) -> Iterator[Wire]:
        """A wire outside the scans, for a caller that waits for its messages itself; places are ranks.

        `agreed`: all that peers must agree on, the same text on every rank. Calls with the same text come in the same
        order on every rank; on NCCL all calls and scans do. When it closes, no more than `in_flight` wires' messages
        may be on their way. Raises `RuntimeError` where a message fails; the group is dead then.
        """
        with self._exchanging(agreed):
            with self._lock:
                signature = _signature(agreed)
                number = self._numbers[signature]
                self._numbers[signature] += 1
            tag = EXCHANGE_TAG | signature << 12 | number & 0xFFF
            nccl = device.type == "cuda" or self.in_line
            wire = NcclWire(self.group) if nccl else GlooWire(self.group, tag)
            yield wire
            sent = wire.close()
            # Not among the scans' own: the progress thread must never wait for a message that this thread sent ahead.
            with self._lock:
                self._lent.append(sent)
            with _observed("exchange"):
                self._settle(self._lent, in_flight)

    def all_to_all(self, arrived: Tensor, leaving: Tensor, come: Sequence[int], to: Sequence[int], agreed: str) -> None:
        """The next `to[r]` numbers of `leaving` go to each rank r, and `arrived` fills with `come[r]` from each.

        A collective; both are contiguous, and of one dimension. Raises as `messages` does.
        """
        with self._exchanging(agreed), _observed("exchange"):
            # NCCL has no complex numbers.
            parts = 2 if leaving.is_complex() else 1
            came, went = ([parts * numbers for numbers in each] for each in (come, to))
            into, out = (torch.view_as_real(x).flatten() if parts == 2 else x for x in (arrived, leaving))
            self.group.alltoall_base(into, out, came, went).wait()

    @contextmanager
    def _exchanging(self, agreed: str) -> Iterator[None]:
        self._check_alive()
        with self._lock:
            self.exchanges += 1
        try:
            yield
        except RuntimeError as failure:
            self._failure = failure
            raise RuntimeError(
                f"messages failed on rank {self.rank} of {self.size} ({agreed[:100]}): a rank has left, or ranks "
                f"disagree about what is sent: {failure}"
            ) from failure

    def stop(self) -> None:
        """Ends the progress thread once it has run what was started."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread = None

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"this process group is dead since an earlier scan or message failed: {self._failure}")

    def _progress(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Job):
                self._run(item)
            else:
                item.set()

    def _run(self, job: Job) -> None:
        try:
            if self._failure is not None:
                raise self._failure
            sent = job.run()
            job.done.set()
            with self._lock:
                self._sent.append(sent)
            self._settle(self._sent, SCANS_IN_FLIGHT)
        except Exception as failure:
            # The caller of `result` raises it; the group can't be used any more.
            self._failure = job.failure = failure
            job.done.set()

    def _settle(self, sent: deque[Sent], in_flight: int) -> None:
        while True:
            with self._lock:
                if len(sent) <= in_flight:
                    return
                oldest = sent.popleft()
            for work, _ in oldest:
                work.wait()

    def _start_on_stream(self, job: Job, own: AffineMap, first: Tensor | None) -> None:
        """NCCL needs no thread: a side stream receives, maps and sends while the current stream computes."""
        device = job.arrivals.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        job.stream = self._streams[device]
        job.stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in (job.arrivals, own.update, own.transition, first):
            if tensor is not None:
                tensor.record_stream(job.stream)
        with torch.cuda.stream(job.stream):
            job.run()
        job.done.set()


def _signature(agreed: str) -> int:
    """16 bits in which two texts hardly ever agree."""
    return zlib.crc32(agreed.encode()) & 0xFFFF


_engines: dict[str, Engine] = {}
_engines_lock = threading.Lock()
_tickets = itertools.count(1)
_jobs: dict[int, Job] = {}


def engine_of(group_name: str) -> Engine:
    """The engine of the process group with this name; a new one where the name was given to another group since."""
    # Newer versions of PyTorch have a type of their own for names of groups; a string is one.
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    with _engines_lock:
        engine = _engines.get(group_name)
        if engine is None or engine.group is not group:
            if engine is not None:
                engine.stop()
            engine = _engines[group_name] = Engine(group)
        return engine


def check_in(job: Job) -> int:
    """A number by which an operator's later call finds `job`."""
    ticket = next(_tickets)
    _jobs[ticket] = job
    return ticket


def check_out(ticket: int) -> Job:
    """The job of a number, once."""
    return _jobs.pop(ticket)
