"""The streams of scans: who may join, what waits, what is said of a rank that is gone, silent, or of another mind."""

import socket
import time

import pytest
import torch
import torch.distributed as dist

from seqtrain.parallel import all_scan
from seqtrain.parallel.scan_engine import engine_of
from seqtrain.parallel.streams import HELLO, TOKEN_BYTES
from seqtrain.parallel.testing import RankError, rank_outcomes
from tests.parallel.ranks import on_ranks

UPDATE = torch.ones(1, 1, 8, 8)


def scan(rank, update=UPDATE):
    state, _ = all_scan(None, update, group=dist.group.WORLD, algorithm="pipeline", blocks=2)
    assert state.unique().tolist() == [float(rank)]


@on_ranks(2, quick=True, limit=30)
def test_strangers_are_turned_away(rank):
    """Whoever connects without the token, with half a greeting, or in the name of a rank that is there already."""
    streams = engine_of(dist.group.WORLD.group_name).form()
    scan(rank)
    host, port, token = streams.addresses[rank]
    for greeting in (b"GET / HTTP/1.1\r\n\r\n12", HELLO.pack(b"x" * TOKEN_BYTES, 1), HELLO.pack(token, 7), b"half"):
        with socket.create_connection((host, port)) as stranger:
            stranger.sendall(greeting)
            if len(greeting) == HELLO.size:
                stranger.settimeout(10)
                assert stranger.recv(1) == b""
            scan(rank)


def one_is_silent(rank):
    scan(rank)
    if rank == 0:
        time.sleep(5)
    scan(rank)


@pytest.mark.all
def test_a_silent_rank_is_named():
    outcomes = rank_outcomes(2, one_is_silent, limit=30, group_timeout=1)
    assert isinstance(outcomes[1], RankError)
    assert "rank 0 sends nothing for 1 s" in str(outcomes[1])


def one_is_of_another_mind(rank):
    scan(rank)
    scan(rank, torch.ones(1, 2, 8, 4 + rank))


def test_another_scan_is_told_at_once():
    begun = time.monotonic()
    outcomes = rank_outcomes(2, one_is_of_another_mind, limit=30, group_timeout=1000)
    assert "rank 0 runs another scan" in str(outcomes[1])
    assert time.monotonic() - begun < 20
