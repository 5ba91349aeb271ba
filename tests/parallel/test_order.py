"""Orders of communication that deadlock are found, and those that don't are not alleged."""

import random

import pytest
import torch
import torch.distributed as dist

from seqtrain.parallel import all_scan
from seqtrain.parallel.exchange import exchange
from seqtrain.parallel.order import MESSAGES, QUEUES, Operation, crossing, deadlocks, recorded
from tests.parallel.ranks import on_ranks


def reduce(*ranks, name="a", size=4):
    return Operation(name, ranks, "allreduce", size)


def messages(*, to=(), of=(), size=4, ranks=(0, 1, 2), name="scan"):
    return Operation(name, ranks, MESSAGES, sends=tuple((p, size) for p in to), receives=tuple((p, size) for p in of))


A, B, CHAIN = reduce(0, 1), reduce(0, 1, name="b"), [[messages(to=[1])], [messages(of=[0])]]
RING = [
    [messages(of=[2]), messages(to=[1])],
    [messages(of=[0]), messages(to=[2])],
    [messages(of=[1]), messages(to=[0])],
]
ROUND = [[messages(to=[1], of=[2])], [messages(to=[2], of=[0])], [messages(to=[0], of=[1])]]
WORLD = reduce(0, 1, 2, name="world")
# Rank 2 reduces before it receives, rank 1 after it has sent: over three ranks and two communicators.
SCAN = [messages(to=[1])], [messages(of=[0]), messages(to=[2])], [messages(of=[1])]


@pytest.mark.parametrize(
    ("orders", "communicator", "device"),
    [
        ([[A, B], [A, B]], False, False),
        ([[A, B], [B, A]], False, True),
        # Each receives before it sends; all at once.
        (RING, True, True),
        (ROUND, False, False),
        ([[WORLD, *SCAN[0]], [*SCAN[1], WORLD], [WORLD, *SCAN[2]]], False, True),
        ([[WORLD, *SCAN[0]], [WORLD, *SCAN[1]], [WORLD, *SCAN[2]]], False, False),
        ([[*SCAN[0], WORLD], [*SCAN[1], WORLD], [*SCAN[2], WORLD]], False, False),
        # One that never comes, a message that nobody sends.
        ([[A], []], True, True),
        ([*CHAIN[:1], [messages(of=[0]), messages(of=[0])]], True, True),
        (CHAIN, False, False),
        # Ranks that disagree.
        ([[A], [reduce(0, 1, size=8)]], True, True),
        ([[A], [Operation("a", (0, 1), "barrier")]], True, True),
        ([*CHAIN[:1], [messages(of=[0], size=8)]], True, True),
    ],
)
def test_made_up_orders(orders, communicator, device):
    assert [bool(deadlocks(orders, queues)) for queues in QUEUES] == [communicator, device]


def test_a_circle_is_told_once_and_in_words():
    [said] = deadlocks([[A, B], [B, A]], "device")
    assert "rank 0 in its operation 0, allreduce of 4 bytes among ranks [0, 1], waits for rank 1" in said
    assert said.endswith("waits for rank 0")
    assert crossing([[A, B], [A, B]]) == [("a", "b")]
    assert crossing([[A, WORLD], [A, WORLD]]) == [("a", "world")]
    assert not crossing([[A], [A, reduce(1, 2, name="b")], [reduce(1, 2, name="b")]])


def test_ranks_that_follow_one_order_never_deadlock_and_two_turned_around_do():
    chance = random.Random(0)
    for _ in range(60):
        ranks, orders = chance.randint(3, 6), [[] for _ in range(6)]
        for _ in range(20):
            some = tuple(sorted(chance.sample(range(ranks), chance.randint(2, ranks))))
            for rank in some:
                orders[rank].append(reduce(*some, name=str(some)))
        assert not any(deadlocks(orders, queues) for queues in QUEUES)
        both = [place for place in range(len(orders[0]) - 1) if orders[0][place] != orders[0][place + 1]]
        place = chance.choice(both)
        one, other = orders[0][place : place + 2]
        orders[0][place : place + 2] = [other, one]
        shared = len(set(one.ranks) & set(other.ranks)) > 1
        assert bool(deadlocks(orders, "device")) or not shared
        assert not deadlocks(orders, "communicator")


@on_ranks(3)
def test_what_ranks_ask_for_is_noted(rank):
    group = dist.group.WORLD
    with recorded() as noted:
        dist.all_reduce(torch.zeros(2))
        state, _ = all_scan(None, torch.ones(1, 1, 2, 2), group=group, algorithm="ring")
        came = exchange(torch.full((3,), float(rank)), [1] * 3, [1] * 3, group=group, agreed="all")
    assert (state.unique().tolist(), came.tolist()) == ([rank], [0, 1, 2])
    dist.all_reduce(torch.zeros(2))
    everyone = [None] * 3
    dist.all_gather_object(everyone, noted)
    assert [each.kind for each in noted if each.kind != MESSAGES][0::2] == ["allreduce"]
    received = [pair for each in noted for pair in each.receives]
    assert received == ([(rank - 1, 16)] if rank else [])
    assert not any(deadlocks(everyone, queues) for queues in QUEUES)
    # A rank that reduces once more, and one that does it too early.
    more = [[*everyone[0], everyone[0][0]], *everyone[1:]]
    assert deadlocks(more, "communicator")
