"""`metrics.jsonl`: one line per step, written by rank 0 and followed by whoever shows it."""

import json
import math
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seqtrain.files import replace_file
from seqtrain.runtime.lease import EpochFolder, Lease
from seqtrain.runtime.run_folder import RunFolder, as_record, read_lines

Record = dict[str, Any]


@dataclass(frozen=True)
class Within:
    """What is being done after `step`: `done` parts of `of` are, segments of the next step or batches of a score."""

    step: int
    done: int
    of: int
    evaluation: bool = False


class MetricsFile:
    """Appends records to `path`, after cutting off what is there from steps beyond `step`.

    Steps that were done after the checkpoint a run resumes from are done again, and each is to have one line. A thread
    writes: a file system that stands still for a while keeps no rank waiting, but those of `flush` and `close`.
    """

    def __init__(self, path: Path, lease: Lease, *, step: int):
        self._lease = lease
        lease.check()
        keep = _bytes_up_to(path, step)
        self._file = path.open("ab")
        self._file.truncate(keep)
        self._waiting: queue.SimpleQueue[bytes | Within | threading.Event | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write_all, name="metrics", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Appends one line, soon. A float that isn't finite, which JSON can't hold, becomes null.

        Raises what went wrong with an earlier one, as `FencedError` where another start has taken over.
        """
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._put(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def within(self, within: Within) -> None:
        """Says how far it is between two records, for the progress bar; after a crash it would mean nothing."""
        self._put(within)

    def flush(self) -> None:
        """Returns when all is written. Raises as `write`."""
        written = threading.Event()
        self._put(written)
        written.wait()
        self._raise()

    def close(self) -> None:
        """Writes the rest, and closes the file. Raises as `write`."""
        self._waiting.put(None)
        self._thread.join()
        self._file.close()
        self._raise()

    def _put(self, what: "bytes | Within | threading.Event") -> None:
        self._raise()
        self._waiting.put(what)

    def _raise(self) -> None:
        if self._error:
            raise self._error

    def _write_all(self) -> None:
        while (what := self._waiting.get()) is not None:
            if isinstance(what, threading.Event):
                what.set()
            elif self._error is None:
                try:
                    self._lease.check()
                    if isinstance(what, Within):
                        replace_file(self._lease.own.within, json.dumps(asdict(what)).encode(), durable=False)
                    else:
                        self._file.write(what)
                        self._file.flush()
                except Exception as error:
                    # For the thread that trains.
                    self._error = error


class MetricsReader:
    """Gives each record once, as it appears; the steps that are done again after a restart, again.

    Begins after what the folder holds already, and gives those of one start: once another takes over, it raises
    `FencedError`.
    """

    def __init__(self, folder: RunFolder, lease: Lease):
        self.folder, self.lease = folder, lease
        self._starts = len(read_lines(folder.starts))
        self._read = _bytes_up_to(folder.metrics, step=sys.maxsize)

    def new(self) -> Iterator[Record]:
        """The records written since the last call."""
        # Each start of the ranks cuts the file back to the step it begins at.
        for start in read_lines(self.folder.starts)[self._starts :]:
            if start["session"] != self.lease.session:
                self.lease.check()
            self._starts += 1
            self._read = _bytes_up_to(self.folder.metrics, start["step"])
        if not self.folder.metrics.exists():
            return
        with self.folder.metrics.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield json.loads(line)


def read_within(folder: EpochFolder) -> Within | None:
    """What was written last; None if nothing was."""
    return Within(**json.loads(folder.within.read_text())) if folder.within.exists() else None


def count_restarts(folder: RunFolder) -> int:
    """How often the ranks were started again by themselves, over all sessions of the run."""
    sessions = [start["session"] for start in read_lines(folder.starts)]
    return len(sessions) - len(set(sessions))


def _bytes_up_to(path: Path, step: int) -> int:
    if not path.exists():
        return 0
    size = 0
    with path.open("rb") as file:
        for line in file:
            # A line without an end was being written when the run was killed.
            if not line.endswith(b"\n") or ((record := as_record(line)) is not None and record["step"] > step):
                break
            size += len(line)
    return size
