"""What scans send on CPUs: a TCP stream from rank to rank, all of them read and written by one thread of a rank.

gloo's messages cost more than the links do: each is announced by another one, is read on a thread of gloo's and wakes
the one that waits. Here a block is one write and one read, nothing announces it, and what has come of a state is used
though the rest has not (figures in docs/performance.md).
"""

import ctypes
import hmac
import os
import secrets
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

# A connection opens with the listener's token and the rank that connects; what each scan sends on it, with the scan's
# signature and number.
TOKEN_BYTES = 16
HELLO, HEADER = struct.Struct(f"<{TOKEN_BYTES}sI"), struct.Struct("<II")
LISTENING = 128
# What is wrong with a rank that is there.
DISAGREES = "runs another scan"
# A rank's host, port and token.
Address = tuple[str, int, bytes]


def failure(rank: int, why: str) -> RuntimeError:
    """A rank that is gone or silent is an error of the network; one that disagrees, of the program."""
    return (RuntimeError if why == DISAGREES else dist.DistNetworkError)(f"rank {rank} {why}")


class Arrival:
    """Where what a rank sends in a scan goes: `size` bytes from byte `start` of `memory`, of which `came` are there."""

    __slots__ = ("came", "memory", "number", "signature", "size", "source", "start", "view")

    def __init__(self, source: "_Incoming", number: int, signature: int, memory: Tensor, start: int):
        self.source, self.number, self.signature = source, number, signature
        self.memory, self.start = memory, start
        self.size = self.came = 0
        self.view = memoryview(b"")


class Leaving:
    """A message that the network has not yet taken whole."""

    __slots__ = ("left", "streams", "target", "view")

    def __init__(self, streams: "Streams", target: "_Outgoing", view: memoryview):
        self.streams, self.target, self.view, self.left = streams, target, view, False

    def wait(self) -> None:
        """On the thread of the streams, until the network has it; raises `RuntimeError` where it never will."""
        deadline = 0.0
        while not self.left:
            deadline = self.streams.step_until(deadline, self.target, "takes no more")


class Streams:
    """The streams of one process group on this rank, for one thread but where it says more.

    Every rank of `group` makes it at the same point; connections are made when they are first needed, by the rank that
    receives: so both ends learn at once of the other's end.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.rank = group.rank()
        backend = group._get_backend(torch.device("cpu"))
        self.timeout: float = backend.options._timeout.total_seconds()
        self._listener, host = _listen()
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self.addresses: list[Address] = [("", 0, b"")] * group.size()
        own: Address = (host, self._listener.getsockname()[1], self._token)
        dist.all_gather_object(self.addresses, own, group=group)
        self._poll = select.poll()
        self._ready: dict[int, Callable[[], None]] = {}
        self._sources = [_Incoming(self, rank) for rank in range(group.size())]
        self._targets = [_Outgoing(self, rank) for rank in range(group.size())]
        # A pipe is the cheapest that wakes a poll.
        self._bell, self._button = os.pipe()
        os.set_blocking(self._bell, False)
        os.set_blocking(self._button, False)
        self._poll.register(self._bell, select.POLLIN)
        self._ready[self._bell] = self._rung
        self._listener.setblocking(False)
        self.watch(self._listener, self._accept)

    def arrival(self, number: int, signature: int, rank: int, memory: Tensor, start: int) -> Arrival:
        """Where what `rank` sends in a scan goes, once it has its size and is posted. From any thread, as `post`."""
        return Arrival(self._sources[rank], number, signature, memory, start)

    def post(self, arrivals: Iterable[Arrival]) -> None:
        """What is sent for these may come, from now on."""
        unseen = False
        for arrival in arrivals:
            source = arrival.source
            source.expected[arrival.number] = arrival
            # The thread can not know of it: a connection is to be made, or a message waits.
            unseen |= source.connection is None or source.stopped
        if unseen:
            self.ring()

    def ring(self) -> None:
        """Has the thread look up: from any other, after it was given something to do."""
        with suppress(BlockingIOError):
            os.write(self._button, b"!")

    def send(self, number: int, signature: int, buffer: Tensor, rank: int) -> Leaving | None:
        """Sends the next message of a scan; returns it where the network has not taken it whole: it is still read."""
        return self._targets[rank].send(number, signature, _bytes(buffer.data_ptr(), buffer.nbytes))

    def receive(self, arrival: Arrival, end: int) -> None:
        """Until `end` bytes have come. Raises `RuntimeError` where they never will, or not within the time-out."""
        deadline = 0.0
        while arrival.came < end:
            deadline = self.step_until(deadline, arrival.source, "sends nothing")

    def step_until(self, deadline: float, peer: "_End", complaint: str) -> float:
        """A step on the way to what `peer` has to do; `deadline`: what the step before returned, 0 for the first."""
        now = time.monotonic()
        deadline = deadline or now + self.timeout
        if peer.lost or now > deadline:
            why = peer.lost or f"{complaint} for {self.timeout:g} s"
            raise failure(peer.rank, why)
        self.step(deadline - now)
        return deadline

    def step(self, seconds: float | None = None) -> None:
        """Waits for the network or the bell, so many seconds at most, and moves what can be moved."""
        for descriptor, _ in self._poll.poll(None if seconds is None else 1e3 * seconds + 1):
            ready = self._ready.get(descriptor)
            if ready is not None:  # else it was closed by one before
                ready()

    def watch(self, connection: socket.socket, ready: Callable[[], None], *, full: bool = False) -> None:
        """Calls `ready` when something has come, or, if it is `full`, when it takes more."""
        self._poll.register(connection, select.POLLIN | (select.POLLOUT if full else 0))
        self._ready[connection.fileno()] = ready

    def ignore(self, connection: socket.socket) -> None:
        if self._ready.pop(connection.fileno(), None) is not None:
            self._poll.unregister(connection)

    def close(self) -> None:
        ends: list[_End] = [*self._sources, *self._targets]
        for each in (self._listener, *(end.connection for end in ends)):
            if each is not None:
                each.close()
        os.close(self._bell)
        os.close(self._button)

    def _rung(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._bell, 4096)
        for source in self._sources:
            if source.expected and (source.connection is None or source.stopped):
                source.resume()

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            self.watch(connection, _Guest(self, connection).ready)

    def welcome(self, connection: socket.socket, token: bytes, rank: int) -> None:
        """Takes the connection of a rank that receives; a stranger's is closed."""
        self.ignore(connection)
        known = hmac.compare_digest(token, self._token) and rank < len(self._targets)
        if known and self._targets[rank].connection is None:
            self._targets[rank].connected(connection)
        else:
            connection.close()


class _Guest:
    """A connection whose other end has not yet said who it is."""

    def __init__(self, streams: Streams, connection: socket.socket):
        self.streams, self.connection, self.said = streams, connection, b""

    def ready(self) -> None:
        try:
            came = self.connection.recv(HELLO.size - len(self.said))
        except BlockingIOError:
            return
        except OSError:
            came = b""
        self.said += came
        if len(self.said) == HELLO.size:
            self.streams.welcome(self.connection, *HELLO.unpack(self.said))
        elif not came:
            self.streams.ignore(self.connection)
            self.connection.close()


class _End:
    """This rank's end of a stream from or to another; `lost`: why there is none any more."""

    def __init__(self, streams: Streams, rank: int):
        self.streams, self.rank = streams, rank
        self.connection: socket.socket | None = None
        self.lost = ""

    def lose(self, why: str) -> None:
        self.lost = why
        if self.connection is not None:
            self.streams.ignore(self.connection)


class _Incoming(_End):
    """What comes from one rank: of each scan a header, then all its bytes."""

    def __init__(self, streams: Streams, rank: int):
        super().__init__(streams, rank)
        self.expected: dict[int, Arrival] = {}
        # A scan comes that is not opened here yet: nothing is read until it is.
        self.stopped = False
        self._current: Arrival | None = None
        self._header = b""

    def resume(self) -> None:
        """After something was posted: connects where it was the first, reads on where it was waited for."""
        if self.connection is None and not self.lost:
            host, port, token = self.streams.addresses[self.rank]
            own = self.streams.addresses[self.streams.rank][0]
            try:
                self.connection = socket.create_connection((host, port), self.streams.timeout, (own, 0))
                self.connection.sendall(HELLO.pack(token, self.streams.rank))
            except OSError as error:
                self.lose(f"can't be reached at {host}:{port}: {error}")
                return
            self.connection.setblocking(False)
            self.streams.watch(self.connection, self.ready)
        elif self.stopped:
            self._find()
            if not self.stopped and self.connection is not None and not self.lost:
                self.streams.watch(self.connection, self.ready)

    def ready(self) -> None:
        try:
            if self._current is None:
                self._read_header()
            if self._current is not None:
                self._read()
        except BlockingIOError:
            pass
        except OSError as error:
            self.lose(f"has left: {error}")

    def _read_header(self) -> None:
        assert self.connection is not None
        came = self.connection.recv(HEADER.size - len(self._header))
        if not came:
            self.lose("has left")
            return
        self._header += came
        if len(self._header) == HEADER.size:
            self._find()

    def _find(self) -> None:
        """The arrival that the header means; stops reading where it is not posted yet."""
        signature, number = HEADER.unpack(self._header)
        # Before it is looked for: who posts it meanwhile sees that, and rings.
        self.stopped = True
        arrival = self.expected.get(number)
        if arrival is None:
            assert self.connection is not None
            self.streams.ignore(self.connection)
            return
        self.stopped, self._header = False, b""
        if arrival.signature != signature:
            self.lose(DISAGREES)
            return
        arrival.view = _bytes(arrival.memory.data_ptr() + arrival.start, arrival.size)
        self._current = arrival

    def _read(self) -> None:
        arrival, connection = self._current, self.connection
        assert arrival is not None
        assert connection is not None
        came = connection.recv_into(arrival.view[arrival.came :])
        if not came:
            self.lose("has left")
            return
        arrival.came += came
        if arrival.came == arrival.size:
            self._current = None
            arrival.view.release()
            del self.expected[arrival.number]


class _Outgoing(_End):
    """What goes to one rank: at once as far as the network takes it, the rest when it takes more."""

    def __init__(self, streams: Streams, rank: int):
        super().__init__(streams, rank)
        self._named = -1
        self._backlog: deque[Leaving] = deque()

    def connected(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.ready()

    def send(self, number: int, signature: int, view: memoryview) -> Leaving | None:
        if self.lost:
            raise failure(self.rank, self.lost)
        header = b"" if number == self._named else HEADER.pack(signature, number)
        self._named = number
        taken = 0
        if not self._backlog and self.connection is not None:
            try:
                taken = self.connection.sendmsg([header, view]) if header else self.connection.send(view)
            except BlockingIOError:
                pass
            except OSError as error:
                self.lose(f"has left: {error}")
                raise failure(self.rank, self.lost) from error
            if taken == len(header) + len(view):
                return None
        if taken < len(header):
            self._backlog.append(Leaving(self.streams, self, memoryview(header)[taken:]))
        leaving = Leaving(self.streams, self, view[max(0, taken - len(header)) :])
        self._backlog.append(leaving)
        if self.connection is not None:
            self.streams.watch(self.connection, self.ready, full=True)
        return leaving

    def ready(self) -> None:
        """Sends on; and what can be read here is only that the other end has closed."""
        assert self.connection is not None
        try:
            while self._backlog:
                first = self._backlog[0]
                first.view = first.view[self.connection.send(first.view) :]
                if len(first.view):
                    break
                first.left = True
                self._backlog.popleft()
            if not self.connection.recv(1):
                self.lose("has left")
                return
        except BlockingIOError:
            pass
        except OSError as error:
            self.lose(f"has left: {error}")
            return
        self.streams.watch(self.connection, self.ready, full=bool(self._backlog))


def _bytes(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _listen() -> tuple[socket.socket, str]:
    """A socket that listens in the network that gloo uses, and this rank's address there."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if name:
        # An extra, which is needed where networks are told apart.
        import psutil

        known = psutil.net_if_addrs()
        hosts = [each.address for each in known.get(name, []) if each.family in (socket.AF_INET, socket.AF_INET6)]
        reason = f"GLOO_SOCKET_IFNAME={name}, of {', '.join(sorted(known))}"
    else:
        hosts, reason = [], "this machine's name, and 127.0.0.1"
        with suppress(OSError):
            hosts = [each[4][0] for each in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
        hosts.append("127.0.0.1")
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with suppress(OSError):
            return socket.create_server((host, 0), family=family, backlog=LISTENING), host
    raise RuntimeError(f"no address to listen on: {reason}")
