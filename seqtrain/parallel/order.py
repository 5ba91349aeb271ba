"""The order in which ranks communicate: noted from what runs, and shown to be free of deadlock, or not.

A rank asks for operations one after the other. An operation ends on a rank when all who take part in it have begun it:
the others of its group, or the peers of its messages. So an order is free of deadlock if and only if no rank waits for
one that, behind others, waits for it; and then it stays so in every order that has fewer constraints, as that of a GPU
which runs more at once.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations, zip_longest
from typing import Any, Literal
from unittest import mock

import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from seqtrain.parallel.scan_engine import Engine

# Messages that are given to the network at once.
MESSAGES = "messages"
# Collectives whose ranks may have different numbers of bytes.
UNEVEN = ("alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter", "allgather", "reduce_scatter")
COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "barrier", *UNEVEN, "allgather_coalesced"),
    *("_allgather_base", "_reduce_scatter_base", "allgather_into_tensor_coalesced", "reduce_scatter_tensor_coalesced"),
    *("all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
)
# How much runs at once on a GPU: one operation of each communicator, or one of all, as the host asked for them.
Queues = Literal["communicator", "device"]
QUEUES: tuple[Queues, ...] = ("communicator", "device")
# A rank, and the number of an operation there.
Place = tuple[int, int]


@dataclass(frozen=True)
class Operation:
    """What a rank asks a communicator for. `kind`: torch's name of a collective, or MESSAGES.

    `bytes`: of a collective, those of the first argument. `sends`, `receives`: of messages, pairs of the peer and
    bytes. Ranks are those of the world.
    """

    communicator: str
    ranks: tuple[int, ...]
    kind: str
    bytes: int = 0
    sends: tuple[tuple[int, int], ...] = ()
    receives: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        if self.kind != MESSAGES:
            return f"{self.kind} of {self.bytes} bytes among {_few(self.ranks)}"
        to, of = (_few([peer for peer, _ in each]) for each in (self.sends, self.receives))
        return f"messages to {to}, from {of}"


def _few(ranks: Sequence[int]) -> str:
    return f"ranks {list(ranks)}" if len(ranks) <= 8 else f"{len(ranks)} ranks"


@contextmanager
def recorded() -> Iterator[list[Operation]]:
    """While open, what this process asks of its groups is noted, in order; scans and messages run as on GPUs.

    That is: on the thread that asks for them, in batches, and without tags (see `Engine.in_line`). For tools and tests:
    it replaces methods of torch's process groups.
    """
    noted: list[Operation] = []
    inside = threading.local()

    def note(group: dist.ProcessGroup, kind: str, **what: Any) -> None:
        noted.append(Operation(group.group_name, tuple(dist.get_process_group_ranks(group)), kind, **what))

    def collective(name: str, method: Callable) -> Callable:
        def call(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            note(group, name, bytes=sum(each.nbytes for each in tree_leaves(arguments[:1]) if hasattr(each, "nbytes")))
            return method(group, *arguments, **options)

        return call

    def alone(name: str, method: Callable) -> Callable:
        def call(group: dist.ProcessGroup, tensors: Any, peer: int, *more: Any, **options: Any) -> Any:
            if not vars(inside).get("batch"):
                pair = (dist.get_global_rank(group, peer), sum(tensor.nbytes for tensor in tensors))
                note(group, MESSAGES, **{f"{name}s" if name == "send" else "receives": (pair,)})
            return method(group, tensors, peer, *more, **options)

        return call

    def batch(messages: list[dist.P2POp]) -> Any:
        pairs = [
            tuple((m.peer, m.tensor.nbytes) for m in messages if m.op is which) for which in (dist.isend, dist.irecv)
        ]
        note(messages[0].group, MESSAGES, sends=pairs[0], receives=pairs[1])
        inside.batch = True
        try:
            return batched(messages)
        finally:
            inside.batch = False

    batched = dist.batch_isend_irecv
    with ExitStack() as stack:
        for names, wrap in ((COLLECTIVES, collective), (("send", "recv"), alone)):
            for name in filter(dist.ProcessGroup.__dict__.__contains__, names):
                method = getattr(dist.ProcessGroup, name)
                stack.enter_context(mock.patch.object(dist.ProcessGroup, name, wrap(name, method)))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", batch))
        stack.enter_context(mock.patch.object(Engine, "in_line", True))
        yield noted


def deadlocks(orders: Sequence[Sequence[Operation]], queues: Queues) -> list[str]:
    """What keeps ranks that ask for `orders`, one list a rank, from coming to an end; empty where nothing does.

    `queues`: what a rank's operations wait for: those asked for before in the same communicator, or all before.
    """
    partners, faults = _partners(orders)
    waiting = _Queues(orders, partners, queues)
    for rank in range(len(orders)):
        for queue in waiting.heads[rank]:
            waiting.begin(rank, queue)
    return faults + waiting.cycles()


def crossing(orders: Sequence[Sequence[Operation]]) -> list[tuple[str, str]]:
    """Pairs of communicators that two ranks or more share: GPUs must run their operations in one order.

    Where GPUs may turn two of them around, each for itself, one can wait in either for the other.
    """
    ranks = {each.communicator: set(each.ranks) for order in orders for each in order}
    return [(a, b) for a, b in combinations(ranks, 2) if len(ranks[a] & ranks[b]) > 1]


def _partners(orders: Sequence[Sequence[Operation]]) -> tuple[dict[Place, list[Place | None]], list[str]]:
    """Who takes part in each operation, None for one who never does, and where ranks disagree about what it is."""
    partners: dict[Place, list[Place | None]] = defaultdict(list)
    calls: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
    sent: dict[tuple[str, int, int], list[tuple[Place, int]]] = defaultdict(list)
    received: dict[tuple[str, int, int], list[tuple[Place, int]]] = defaultdict(list)
    for rank, order in enumerate(orders):
        counts: dict[str, int] = defaultdict(int)
        for number, each in enumerate(order):
            if each.kind != MESSAGES:
                calls[each.communicator, counts[each.communicator]][rank] = number
                counts[each.communicator] += 1
            for peer, size in each.sends:
                sent[each.communicator, rank, peer].append(((rank, number), size))
            for peer, size in each.receives:
                received[each.communicator, peer, rank].append(((rank, number), size))
    faults = []
    for places in calls.values():
        first = orders[(rank := min(places))][places[rank]]
        for other, number in places.items():
            each = orders[other][number]
            sizes = each.kind in UNEVEN or each.bytes == first.bytes
            if each.kind != first.kind or not sizes:
                faults.append(f"rank {rank} asks for {first}, and rank {other} for {each}")
            partners[other, number] += [
                (peer, places[peer]) if peer in places else None for peer in each.ranks if peer != other
            ]
    for key in sent.keys() | received.keys():
        for here, there in zip_longest(sent[key], received[key]):
            for end, other_end in ((here, there), (there, here)):
                if end is not None:
                    partners[end[0]].append(None if other_end is None else other_end[0])
            if here and there and here[1] != there[1]:
                faults.append(f"rank {key[1]} sends {here[1]} bytes, and rank {key[2]} waits for {there[1]}")
    return partners, faults


class _Queues:
    """The operations of all ranks while they run: in each queue of a rank one after the other."""

    def __init__(
        self, orders: Sequence[Sequence[Operation]], partners: dict[Place, list[Place | None]], queues: Queues
    ):
        self.orders, self.partners = orders, partners
        self.of = [[each.communicator if queues == "communicator" else "" for each in order] for order in orders]
        self.heads: list[dict[str, int]] = []
        self.next: dict[Place, Place] = {}
        for rank, keys in enumerate(self.of):
            last: dict[str, int] = {}
            first: dict[str, int] = {}
            for number, key in enumerate(keys):
                if key in last:
                    self.next[rank, last[key]] = (rank, number)
                first.setdefault(key, number)
                last[key] = number
            self.heads.append(first)
        # How many of its partners an operation that has begun waits for; 0 once it has ended.
        self.missing: dict[Place, int] = {}

    def begin(self, rank: int, queue: str) -> None:
        begun = [(rank, self.heads[rank][queue])]
        while begun:
            place = begun.pop()
            partners = self.partners[place]
            self.missing[place] = sum(each is None or each not in self.missing for each in partners)
            met = [each for each in partners if each is not None and each in self.missing]
            for each in met:
                # A partner that is met in several messages waits for each of them.
                self.missing[each] -= 1
            for each in {place, *met}:
                if not self.missing[each] and each in self.next:
                    begun.append(self.next.pop(each))

    def cycles(self) -> list[str]:
        """In words, of each circle of ranks that wait for each other; or of who waits for one that never comes."""
        stuck = {(rank, self.of[rank][number]): number for (rank, number), missing in self.missing.items() if missing}
        told, found = set(), []
        for start in stuck.items():
            path: list[tuple[tuple[int, str], int]] = []
            at: tuple[tuple[int, str], int] | None = start
            while at is not None and at not in path:
                path.append(at)
                at = self._waits_for(at, stuck)
            circle = path[path.index(at) :] if at is not None else path[-1:]
            if frozenset(circle) not in told:
                told.add(frozenset(circle))
                found.append(self._in_words(circle, closed=at is not None))
        return found

    def _waits_for(
        self, at: tuple[tuple[int, str], int], stuck: dict[tuple[int, str], int]
    ) -> tuple[tuple[int, str], int] | None:
        (rank, _), number = at
        for partner in self.partners[rank, number]:
            if partner is not None and partner not in self.missing:
                key = (partner[0], self.of[partner[0]][partner[1]])
                return key, stuck[key]
        return None

    def _in_words(self, circle: list[tuple[tuple[int, str], int]], *, closed: bool) -> str:
        steps = [f"rank {rank} in its operation {number}, {self.orders[rank][number]}," for (rank, _), number in circle]
        if not closed:
            return f"{steps[0]} waits for one that never comes to it"
        return " waits for ".join([*steps, f"rank {circle[0][0][0]}"])
