"""Processes that tokenize: those of this machine; others stand behind the same two names."""

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol, TypeVar

from seqtrain.errors import DataError, SeqtrainError
from seqtrain.validation import AUTO

T = TypeVar("T")

# What a process of a pool runs. Its threads are the processes beside it.
SERVE = [sys.executable, "-c", "from seqtrain.data.pool import serve; serve()"]
ALONE = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}


class Pool(Protocol):
    """So many processes that call what is submitted: a function of a module, and plain values."""

    workers: int

    def submit(self, function: Callable[[Any], T], argument: Any, /) -> "Future[T]":
        """Calls `function(argument)` in one of them."""
        ...


# Given how many processes can be of use: a pool, or None for this process alone.
Pools = Callable[[int], AbstractContextManager[Pool | None]]


def local_pools(wanted: int | str) -> Pools:
    """Processes of this machine, as many as are wanted; `auto`: as many as it has cores."""

    @contextmanager
    def pools(most: int) -> Iterator[Pool | None]:
        # Each takes seconds to start, so two sections at least for each.
        workers = min(_cores(), most // 2) if wanted == AUTO else min(int(wanted), most)
        if workers < 2:
            yield None
            return
        pool = Processes(workers)
        try:
            yield pool
        finally:
            pool.end()

    return pools


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Processes:
    """A pool of processes that are told what to call through pipes.

    In place of multiprocessing's: a process with threads is not forked, the program that called needs no guarded main
    module, and when this process ends, however it ends, each of them does after its call.
    """

    def __init__(self, workers: int):
        self.workers = workers
        environment = os.environ | ALONE | {"PYTHONPATH": os.pathsep.join(sys.path)}
        # In a group of their own: what is typed at a terminal is for the process that started them.
        self._processes = [
            subprocess.Popen(
                SERVE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
            for _ in range(workers)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(workers, "tokenize")

    def submit(self, function: Callable[[Any], T], argument: Any, /) -> "Future[T]":
        return self._threads.submit(self._call, function, argument)

    def _call(self, function: Callable[[Any], T], argument: Any) -> T:
        process = self._idle.get()
        assert process.stdin
        assert process.stdout
        try:
            pickle.dump((function, argument), process.stdin)
            process.stdin.flush()
            failed, value = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise DataError(
                f"data.workers={self.workers}: a process that tokenized text ended (status {process.wait()}), as when "
                "memory runs out; finished shards are kept; rerun to resume, with fewer"
            ) from None
        finally:
            self._idle.put(process)
        if failed:
            raise value
        result: T = value
        return result

    def end(self) -> None:
        """Ends the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            # Closes its pipes, too.
            process.communicate()


def serve() -> None:
    """Calls what comes through stdin; results go to what was stdout, what is printed to stderr.

    When stdin is closed, whoever asked has ended, and so does this process at once: another may be making the same.
    """
    coming, results = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    calls: queue.SimpleQueue[tuple[Callable[[Any], Any], Any]] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                calls.put(pickle.load(coming))
        except EOFError:
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        told = attempt(*calls.get())
        with suppress(BrokenPipeError):
            pickle.dump(told, results)
            results.flush()


def attempt(function: Callable[[Any], T], argument: Any) -> tuple[bool, T | Exception]:
    """Whether `function(argument)` fails, and its result or the error, as they can be sent to another process."""
    try:
        return False, function(argument)
    except SeqtrainError as error:
        return True, error
    except Exception as error:
        return True, RuntimeError(f"{type(error).__name__}: {error}")
