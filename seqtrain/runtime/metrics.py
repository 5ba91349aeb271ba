"""`metrics.jsonl`: one line per step, written by rank 0 and followed by whoever shows it."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seqtrain.files import replace_file
from seqtrain.runtime.lease import EpochFolder, Lease
from seqtrain.runtime.run_folder import RunFolder, as_record, read_lines

Record = dict[str, Any]


class MetricsFile:
    """Appends records to `path`, after cutting off what is there from steps beyond `step`.

    Steps that were done after the checkpoint a run resumes from are done again, and each is to have one line.
    """

    def __init__(self, path: Path, lease: Lease, *, step: int):
        self._lease = lease
        lease.check()
        keep = _bytes_up_to(path, step)
        self._file = path.open("ab")
        self._file.truncate(keep)

    def write(self, record: Record) -> None:
        """Appends one line. A float that isn't finite, which JSON can't hold, becomes null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        line = json.dumps(finite, allow_nan=False)
        self._lease.check()
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


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


@dataclass(frozen=True)
class Within:
    """What is being done after `step`: `done` parts of `of` are, segments of the next step or batches of a score."""

    step: int
    done: int
    of: int
    evaluation: bool = False


def write_within(lease: Lease, within: Within) -> None:
    """Writes how far it is between two records, for the progress bar; after a crash it would mean nothing."""
    lease.check()
    replace_file(lease.own.within, json.dumps(asdict(within)).encode(), durable=False)


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
