"""Runs the scans of one process group: in order, on a thread of its own, so that they advance while a rank computes.

Receives are posted early, sends never block. On CPUs scans travel in streams of their own, all other messages by gloo.
"""

import itertools
import threading
import zlib
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from seqtrain.kernels.affine import AffineMap, AffineShape
from seqtrain.parallel.streams import Streams
from seqtrain.parallel.wires import ExchangeWire, GlooWire, NcclWire, Sent, StreamWire, Wire, observed

if TYPE_CHECKING:
    from seqtrain.parallel.schedules.base import Schedule
    from seqtrain.parallel.schedules.links import Costs

# Sends are waited for this many scans later: a rank may run ahead of a slow neighbor by as many layers.
SCANS_IN_FLIGHT = 4
# The tag of a message outside scans has this bit, which keeps clear of small tags of others, then 16 bits of what peers
# must agree on (a disagreement about sizes never matches) and 12 bits of a sequence number per agreed text.
EXCHANGE_TAG = 1 << 29


def _again(failure: Exception, text: str) -> RuntimeError:
    """An error of the same kind: that a peer is lost stays known."""
    return dist.DistNetworkError(text) if isinstance(failure, dist.DistError) else RuntimeError(text)


class Job:
    """One scan: opened (receives posted), started (own map known), finished."""

    def __init__(self, engine: "Engine", plan: "Schedule", shape: AffineShape, wire: Wire, arrivals: Tensor):
        self.engine = engine
        self.plan = plan
        self.shape = shape
        self.wire = wire
        self.arrivals = arrivals
        self.travel = plan.prepare(wire, shape, arrivals)
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
        with torch.no_grad(), observed("run"):
            if self.wire.place:
                first = None
            elif first is None:
                first = torch.zeros_like(own.update, memory_format=torch.contiguous_format)
            else:  # results are the caller's, who may write to them
                first = first.clone(memory_format=torch.contiguous_format)
            self.states = self.travel(own, first)
            return self.wire.close()

    def result(self) -> tuple[Tensor, Tensor]:
        """Waits, then `(incoming, outgoing)` state, `[rows, depth, columns]`; `RuntimeError` if the scan failed."""
        with observed("scan"):
            self.done.wait()
        if self.failure is not None:
            raise _again(
                self.failure,
                f"all_scan failed at place {self.wire.place} of {self.wire.places} ({self.plan.name}, {self.shape}): "
                f"a rank has left, or ranks disagree about the scan: {self.failure}",
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
        self.streams: Streams | None = None  # formed when all ranks are there
        self._opened = 0
        self._numbers: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._sent: deque[Sent] = deque()
        self._lent: deque[Sent] = deque()
        self._queue: deque[Job | threading.Event | None] = deque()
        self._thread: threading.Thread | None = None
        self._side: dict[torch.device, torch.cuda.Stream] = {}

    def form(self) -> Streams | None:
        """Makes the streams of scans on CPUs, the first time; then all ranks must call it, at the same point."""
        if self.size == 1 or self.in_line:
            return None
        if self.streams is None:
            # Ranks tell each other over gloo where they are.
            if self.group._get_backend(torch.device("cpu")).name() != "gloo":
                return None
            self.streams = Streams(self.group)
            name = f"all_scan {self.group.group_name}"
            self._thread = threading.Thread(target=self._progress, args=(self.streams,), name=name, daemon=True)
            self._thread.start()
        return self.streams

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
            streams = self.form() if device.type == "cpu" else None
            wire: Wire
            if streams is None:
                wire = NcclWire(self.group, reverse)
            else:
                agreed = f"{plan} {shape} {dtype} {reverse} {list(resets)}"
                wire = StreamWire(self.group, streams, number, agreed, reverse)
            wire.resets = resets
            messages = plan.receives(shape, wire.place, wire.places)
            arrivals = torch.empty(sum(m.numbers for m in messages), dtype=dtype, device=device)
            wire.post_all(arrivals, messages)
        return Job(self, plan, shape, wire, arrivals)

    def start(self, job: Job, own: AffineMap, first: Tensor | None) -> None:
        """Lets the scan run. `own`: this rank's map; `first`: the state before place 0, which only place 0 reads."""
        job.inputs = (own, first)
        if job.arrivals.is_cuda and not self.in_line:
            self._start_on_stream(job, own, first)
        elif isinstance(job.wire, StreamWire):
            self._queue.append(job)
            job.wire.streams.ring()
            if job.plan.blocking:
                job.done.wait()
        else:
            self._run(job)

    def flush(self) -> None:
        """Waits until every started scan has run and every message of this rank has left it."""
        with observed("scan"):
            if self.streams is not None:
                was_alive, reached = self._failure is None, threading.Event()
                self._queue.append(reached)
                self.streams.ring()
                reached.wait()
                if was_alive:
                    self._check_alive()
            self._settle(self._sent, 0)
            self._settle(self._lent, 0)

    @contextmanager
    def messages(self, agreed: str, device: torch.device, *, in_flight: int = 0) -> Iterator[ExchangeWire]:
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
            wire: ExchangeWire = NcclWire(self.group) if nccl else GlooWire(self.group, tag)
            yield wire
            sent = wire.close()
            # Not among the scans' own: the progress thread must never wait for a message that this thread sent ahead.
            with self._lock:
                self._lent.append(sent)
            with observed("exchange"):
                self._settle(self._lent, in_flight)

    def all_to_all(self, arrived: Tensor, leaving: Tensor, come: Sequence[int], to: Sequence[int], agreed: str) -> None:
        """The next `to[r]` numbers of `leaving` go to each rank r, and `arrived` fills with `come[r]` from each.

        A collective; both are contiguous, and of one dimension. Raises as `messages` does.
        """
        with self._exchanging(agreed), observed("exchange"):
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
            raise _again(
                failure,
                f"messages failed on rank {self.rank} of {self.size} ({agreed[:100]}): a rank has left, or ranks "
                f"disagree about what is sent: {failure}",
            ) from failure

    def stop(self) -> None:
        """Ends the progress thread once it has run what was started."""
        if self.streams is not None:
            self._queue.append(None)
            self.streams.ring()
            self.streams = None

    def _check_alive(self) -> None:
        if self._failure is not None:
            text = f"this process group is dead since an earlier scan or message failed: {self._failure}"
            raise _again(self._failure, text)

    def _progress(self, streams: Streams) -> None:
        while True:
            if not self._queue:
                streams.step()
                continue
            item = self._queue.popleft()
            if item is None:
                streams.close()
                return
            if isinstance(item, Job):
                self._run(item)
                continue
            try:
                self._settle(self._sent, 0)
            except RuntimeError as failure:
                self._failure = failure
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
        if device not in self._side:
            self._side[device] = torch.cuda.Stream(device)
        job.stream = self._side[device]
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
