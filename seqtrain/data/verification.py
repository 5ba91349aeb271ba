"""Whether shards are still what was written: those of a small corpus before it is used, of a large one while it is.

What is known to be right is remembered by the time of a shard's last change, next to the corpus, for all processes.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np

from seqtrain.data.manifest import ShardIndex
from seqtrain.errors import DataError

# Bytes of shards that are read whole before a corpus is used: a second or two.
AT_ONCE = 2**30
WIDTH = 8


class Stamps:
    """When the shards of a split that were read whole and found right last changed: ns, by number; 0 for the others.

    A file of int64 that all processes read and write, a number at a time; where it can't be written, nothing is kept.
    """

    def __init__(self, shards: ShardIndex):
        self.file = shards.folder / f"{shards.split}.verified"

    def __getitem__(self, number: int) -> int:
        try:
            with self.file.open("rb") as opened:
                return int.from_bytes(os.pread(opened.fileno(), WIDTH, number * WIDTH), "little")
        except OSError:
            return 0

    def __setitem__(self, number: int, time: int) -> None:
        if not os.access(self.file.parent, os.W_OK):
            return
        opened = os.open(self.file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(opened, time.to_bytes(WIDTH, "little"), number * WIDTH)
        finally:
            os.close(opened)


def write_stamps(folder: Path, split: str, times: np.ndarray) -> None:
    """Says of all shards of a split, just written and read back, that they are right; `times`: int64 `[shards]`."""
    (folder / f"{split}.verified").write_bytes(times.astype("<i8").tobytes())


def verify_at_once(indexes: Iterable[ShardIndex], *, always: bool) -> None:
    """Reads every shard that isn't known to be right; `always`: every shard. Raises `DataError` for a damaged one."""
    for shards in indexes:
        stamps = Stamps(shards)
        for number in range(len(shards)):
            _verify(shards, stamps, number, always=always)


def _verify(shards: ShardIndex, stamps: Stamps, number: int, *, always: bool, stop: Event | None = None) -> None:
    shard = shards.shard(number)
    if (always or stamps[number] != shard.changed) and shard.verify(stop):
        stamps[number] = shard.changed


class Verification:
    """Verifies shards in a thread while they are read: of all of them, rank `rank` of `ranks` takes every `ranks`-th.

    So data is used at most one such pass before it is known to be right; and a run that ends earlier verifies what it
    has read first, see `state` and `verify`.
    """

    def __init__(self, indexes: Sequence[ShardIndex], *, rank: int = 0, ranks: int = 1, always: bool = False):
        self._indexes = [(shards, Stamps(shards)) for shards in indexes]
        self._ends = np.cumsum([len(shards) for shards in indexes], dtype=np.int64)
        self._mine = range(rank, int(self._ends[-1]) if indexes else 0, ranks)
        self._always = always
        self._right: set[int] = set()
        self._stop = Event()
        self._error: DataError | None = None

    @contextmanager
    def running(self) -> Iterator["Verification"]:
        """The thread runs while it is open."""
        thread = Thread(target=self._run, name="verify", daemon=True)
        if self._mine:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            if self._mine:
                thread.join()

    def check(self) -> None:
        """Raises the `DataError` of a damaged shard that was found; to be called before every step."""
        if self._error:
            raise self._error

    @property
    def state(self) -> np.ndarray:
        """bool `[2, shards]`: those this process has read from, and those it knows to be right."""
        state = np.zeros((2, int(self._ends[-1]) if self._indexes else 0), bool)
        for (shards, _), end in zip(self._indexes, self._ends, strict=True):
            state[0, [end - len(shards) + number for number in list(shards.touched)]] = True
        state[1, list(self._right)] = True
        return state

    def verify(self, numbers: Iterable[int]) -> None:
        """Verifies the shards of these numbers now, of all splits together. Raises `DataError`."""
        for number in numbers:
            place = int(np.searchsorted(self._ends, number, side="right"))
            shards, stamps = self._indexes[place]
            within = int(number - self._ends[place]) + len(shards)
            _verify(shards, stamps, within, always=self._always, stop=self._stop)
            self._right.add(int(number))

    def _run(self) -> None:
        try:
            for number in self._mine:
                if self._stop.is_set():
                    return
                self.verify([number])
        except DataError as error:
            self._error = error
        except OSError as error:
            self._error = DataError(f"{error.filename or 'a shard'}: can't be verified ({error.strerror})")
