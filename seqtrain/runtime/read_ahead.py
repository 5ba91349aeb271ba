"""Batches of the next steps, read by a thread while a step is computed."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from seqtrain.data import Batch

# Steps that are read ahead of the one that is computed.
AHEAD = 2


class ReadAhead:
    """Calls `read(step)`, which gives a step's batches, ahead of its turn, up to step `stop`.

    Which rows a step has follows from its number, so what is read ahead is what would be read later. `waits`: how many
    steps had to wait, as the first one does.
    """

    def __init__(self, read: Callable[[int], list[Batch]], *, stop: int):
        self.stop = stop
        self.waits = 0
        self._read = read
        self._coming: dict[int, Future[list[Batch]]] = {}
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    @contextmanager
    def running(self) -> Iterator["ReadAhead"]:
        """When it is left, there is no thread any more."""
        try:
            yield self
        finally:
            self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> list[Batch]:
        """The batches of a step. Raises what reading them raised."""
        for coming in range(step, max(step + 1, min(step + 1 + AHEAD, self.stop))):
            if coming not in self._coming:
                self._coming[coming] = self._thread.submit(self._read, coming)
        batches = self._coming.pop(step)
        self.waits += not batches.done()
        return batches.result()
