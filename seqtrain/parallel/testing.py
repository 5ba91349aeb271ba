"""Ranks of a process group as forked processes, for tests: 0.2 seconds a launch where spawning takes 8."""

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # operators import it on their first call: 2 s once here, not in each child
import torch.distributed as dist


class RankError(RuntimeError):
    """What went wrong on a rank: `rank`, its traceback as the message, and `error`, what it raised.

    `error` is None for a rank that died or hung, or whose error can't be sent to another process.
    """

    def __init__(self, rank: int, message: str, error: BaseException | None = None):
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank
        self.message = message
        self.error = error

    # Without it another process could not be told: the arguments differ from the text.
    def __reduce__(self) -> tuple[Any, ...]:
        return RankError, (self.rank, self.message, self.error)


def run_ranks(
    ranks: int, function: Callable[..., Any], *arguments: Any, limit: float = 60.0, group_timeout: float = 30.0
) -> list[Any]:
    """Runs `function(rank, *arguments)` on `ranks` forked processes that form a gloo group; returns what each returned.

    `limit`: seconds for all of it; `group_timeout`: seconds for one collective. The function may be any, closures
    included; results are pickled. A rank that raises, dies or outlasts the limit ends the others, and the first failure
    is raised as `RankError`. Nothing in this process may have started a process group.
    """
    outcomes = rank_outcomes(
        ranks, function, *arguments, limit=limit, group_timeout=group_timeout, until_first_failure=True
    )
    for outcome in outcomes:
        if isinstance(outcome, RankError):
            raise outcome
    return outcomes


def rank_outcomes(
    ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    limit: float = 60.0,
    group_timeout: float = 30.0,
    until_first_failure: bool = False,
) -> list[Any]:
    """`run_ranks` that lets every rank come to its own end: what each returned, or its `RankError`."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        children = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            call = (rank, ranks, Path(folder) / "store", group_timeout, theirs, function, arguments)
            child = context.Process(target=_rank_main, args=call, daemon=True)
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        try:
            return _collect(pipes, limit, until_first_failure)
        finally:
            for child in children:
                child.kill()
                child.join()


def _collect(pipes: list[Connection], limit: float, until_first_failure: bool) -> list[Any]:
    """Each rank's outcome; after a first failure that ends the launch, None for those that have none yet."""
    deadline = time.monotonic() + limit
    outcomes: dict[int, Any] = {}
    while len(outcomes) < len(pipes):
        waiting = {id(pipe): rank for rank, pipe in enumerate(pipes) if rank not in outcomes}
        ready = wait([pipes[rank] for rank in waiting.values()], timeout=max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            rank = waiting[id(pipe)]
            try:
                succeeded, outcome = pipes[rank].recv()
            except (EOFError, ConnectionError):
                succeeded, outcome = False, ("died without a word", None)
            outcomes[rank] = outcome if succeeded else RankError(rank, *outcome)
            if not succeeded and until_first_failure:
                return [outcomes.get(rank) for rank in range(len(pipes))]
        if not ready:
            late = RankError(min(waiting.values()), f"ranks {sorted(waiting.values())} did not end within {limit:g} s")
            outcomes |= dict.fromkeys(waiting.values(), late)
    return [outcomes[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int, ranks: int, store: Path, group_timeout: float, pipe: Connection, function: Callable, arguments: tuple
) -> None:
    # A child that multiplies matrices with the parent's OpenMP threads, which fork does not copy, hangs.
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), ranks),
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=group_timeout),
        )
        dist.barrier()  # a rank may fail from here on: all the others are connected
        pipe.send((True, function(rank, *arguments)))
        # Others may still be reading what this rank has sent: it stays until it is ended.
        threading.Event().wait()
    except BaseException as error:
        pipe.send((False, (traceback.format_exc(), _sendable(error))))
    # Threads that wait for a dead peer would keep an ordinary exit from ending.
    os._exit(0)


def _sendable(error: BaseException) -> BaseException | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None
