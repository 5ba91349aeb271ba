"""One shard of a corpus: a file of token ids.

A shard has a header, token ids, and where documents start, in one file that is read through a memory map.

    bytes 0-7   magic b"seqtrain"       8-11 version        12-15 bytes per id (2, 4)       16-23 tokens
    24-31       document starts         32-39 vocab_size    40-47 changes       48-63 zero
    64-         ids, little endian, padded with zeros to a multiple of 8; then the starts and the changes, int64, rising

A start is a position in this shard. A document may continue in the next shard: only its start is written. Tokens are
predicted up to the first change, from the second to the third, and so on; text has none.
"""

import hashlib
import mmap
import os
import shutil
import stat
import struct
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqtrain.errors import DataError
from seqtrain.files import publish, sha256_of

MAGIC = b"seqtrain"
SHARD_VERSION = 1
HEADER = struct.Struct("<8sIIQQQQ16x")
# Ids looked at in one go when a shard is checked.
CHECKED = 2**20


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file's name inside the folder, how many tokens and document starts it holds, its checksum."""

    file: str
    tokens: int
    starts: int
    sha256: str


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises `DataError` for a name that leads anywhere else."""
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise _foreign(folder / name)
    return folder / name


def _foreign(path: Path) -> DataError:
    return DataError(
        f"{path.parent}: its manifest names the file {path.name!r}; shards must be plain files of that folder itself"
    )


def id_type(vocab_size: int) -> np.dtype:
    """The narrowest dtype a shard may use for ids below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _layout(tokens: int, starts: int, itemsize: int) -> tuple[int, int]:
    """Byte offset of the starts, and size of the whole file."""
    offset = HEADER.size + -(-tokens * itemsize // 8) * 8
    return offset, offset + 8 * starts


class ShardWriter:
    """Writes one shard, piece by piece, into a file that gets its name only when it is whole."""

    def __init__(self, file: Path, vocab_size: int):
        self.file = file
        self.vocab_size = vocab_size
        self.tokens = 0
        self.starts = 0
        self._dtype = id_type(vocab_size)
        # A name of its own: a process whose parent was killed may still be writing the same shard.
        self._unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._opened = self._unfinished.open("wb")
        self._opened.write(bytes(HEADER.size))
        # They follow the ids in the file; of tiny documents they would take more memory than all else.
        self._starts_file = self._unfinished.with_suffix(".starts.tmp")
        self._opened_starts = self._starts_file.open("w+b")
        # Where tokens begin and cease to be predicted; whether the last one is.
        self._changes: list[np.ndarray] = []
        self._counted = True

    def append(self, ids: np.ndarray, starts: np.ndarray, counted: np.ndarray | None = None) -> None:
        """Adds `ids`, of which those at the positions `starts` begin a document.

        `counted`: bool, which of them are predicted; by default, all.
        """
        if counted is not None:
            self._changes.append(np.flatnonzero(np.diff(counted, prepend=self._counted)).astype("<i8") + self.tokens)
            self._counted = bool(counted[-1])
        self._opened.write(ids.astype(self._dtype).tobytes())
        self._opened_starts.write((starts.astype("<i8") + self.tokens).tobytes())
        self.tokens += len(ids)
        self.starts += len(starts)

    def close(self) -> ShardEntry:
        """Finishes the file, which then has its name."""
        offset, _ = _layout(self.tokens, self.starts, self._dtype.itemsize)
        self._opened.write(bytes(offset - self._opened.tell()))
        self._opened_starts.seek(0)
        shutil.copyfileobj(self._opened_starts, self._opened)
        for changes in self._changes:
            self._opened.write(changes.tobytes())
        self._opened.seek(0)
        count = sum(map(len, self._changes))
        fields = (MAGIC, SHARD_VERSION, self._dtype.itemsize, self.tokens, self.starts, self.vocab_size, count)
        self._opened.write(HEADER.pack(*fields))
        self.abandon()
        self._starts_file.unlink()
        publish(self._unfinished, self.file)
        return ShardEntry(self.file.name, self.tokens, self.starts, sha256_of(self.file))

    def abandon(self) -> None:
        """Closes the files without finishing the shard; the next run starts it again."""
        self._opened.close()
        self._opened_starts.close()


@dataclass(frozen=True)
class Shard:
    """A finished shard, mapped; `content` is its file, `changed` when that last changed, in ns."""

    path: Path
    entry: ShardEntry
    vocab_size: int
    content: mmap.mmap
    changed: int

    @classmethod
    def open(cls, folder: Path, entry: ShardEntry, vocab_size: int) -> "Shard":
        """Maps the shard `entry` names, and checks its header and size. Raises `DataError`."""
        path = inside(folder, entry.file)
        try:
            # Neither through a link to elsewhere, nor waiting for the other end of a pipe.
            opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if path.is_symlink():
                raise _foreign(path) from None
            raise _error(path, f"can't be read ({error.strerror})") from None
        try:
            status = os.fstat(opened)
            if not stat.S_ISREG(status.st_mode):
                raise _foreign(path)
            header = os.pread(opened, HEADER.size, 0)
            changes = HEADER.unpack(header)[-1] if len(header) == HEADER.size else 0
            _check_size(path, entry, vocab_size, status.st_size - 8 * changes)
            content = mmap.mmap(opened, 0, access=mmap.ACCESS_READ)
            shard = cls(path, entry, vocab_size, content, status.st_mtime_ns)
        finally:
            os.close(opened)
        shard._check_header()
        return shard

    def ids(self) -> np.ndarray:
        """The ids: uint16 or uint32 `[tokens]`."""
        return np.frombuffer(self.content, id_type(self.vocab_size), self.entry.tokens, HEADER.size)

    def starts(self) -> np.ndarray:
        """The positions in this shard at which documents start: int64 `[starts]`."""
        offset, _ = _layout(self.entry.tokens, self.entry.starts, id_type(self.vocab_size).itemsize)
        # Where there are none, the offset is the file's end, which numpy refuses.
        return np.frombuffer(self.content, "<i8", self.entry.starts, offset) if self.entry.starts else NO_STARTS

    def changes(self) -> np.ndarray:
        """Positions in this shard at which tokens cease to be predicted, and are again, in turn: int64, rising."""
        _, offset = _layout(self.entry.tokens, self.entry.starts, id_type(self.vocab_size).itemsize)
        return np.frombuffer(self.content, "<i8", -1, offset) if offset < len(self.content) else NO_STARTS

    def counted(self, start: int, stop: int) -> np.ndarray:
        """bool `[stop - start]`: whether the tokens at `start <= position < stop` are predicted."""
        changes = self.changes()
        before, upto = np.searchsorted(changes, [start, stop])
        changed = np.zeros(stop - start, dtype=np.int64)
        changed[changes[before:upto] - start] = 1
        return (before + changed.cumsum()) % 2 == 0

    def verify(self, stop: threading.Event | None = None) -> bool:
        """Reads the whole shard: checksum, ids below the vocabulary, starts that rise. Raises `DataError`.

        False where `stop` was set before it was done.
        """
        digest = hashlib.sha256()
        try:
            # Not through the map: what is read there counts as this process's memory.
            with self.path.open("rb") as opened:
                while block := opened.read(CHECKED):
                    digest.update(block)
                    if stop and stop.is_set():
                        return False
        except OSError as error:
            raise _error(self.path, f"can't be read ({error.strerror})") from None
        came = digest.hexdigest()
        if came != self.entry.sha256:
            raise _error(
                self.path, f"checksum is {came[:12]}, the manifest says {self.entry.sha256[:12]}: the file is damaged"
            )
        self._check_values()
        return True

    def _check_values(self) -> None:
        ids = self.ids()
        for at in range(0, self.entry.tokens, CHECKED):
            self._forget()
            foreign = ids[at : at + CHECKED] >= self.vocab_size
            if foreign.any():
                place = at + int(np.argmax(foreign))
                offset = HEADER.size + place * ids.itemsize
                raise _error(self.path, f"id {ids[place]} at byte {offset}, but ids are below {self.vocab_size}")
        for what, places in (("document starts", self.starts()), ("changes", self.changes())):
            rising = all((np.diff(places[at : at + CHECKED + 1]) > 0).all() for at in range(0, len(places), CHECKED))
            if len(places) and not (rising and places[0] >= 0 and places[-1] < self.entry.tokens):
                raise _error(self.path, f"{what} do not rise inside the shard")
        self._forget()

    def _forget(self) -> None:
        """Lets go of what was read through the map; it stays in the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self.content.madvise(mmap.MADV_DONTNEED)

    def _check_header(self) -> None:
        fields = HEADER.unpack(self.content[: HEADER.size])
        magic, version, came_itemsize, tokens, starts, vocab_size, _ = fields
        itemsize = id_type(self.vocab_size).itemsize
        if magic != MAGIC:
            raise _error(self.path, f"not a token shard: it starts with {magic!r}")
        if version != SHARD_VERSION:
            raise _error(self.path, f"shard version {version}, this seqtrain reads {SHARD_VERSION}")
        if vocab_size != self.vocab_size:
            raise _error(self.path, f"made for {vocab_size} token ids, but the tokenizer has {self.vocab_size}")
        came, expected = (came_itemsize, tokens, starts), (itemsize, self.entry.tokens, self.entry.starts)
        if came != expected:
            raise _error(self.path, f"header says {came} for (bytes per id, tokens, starts), the manifest {expected}")


NO_STARTS = np.empty(0, dtype=np.int64)


def _check_size(path: Path, entry: ShardEntry, vocab_size: int, size: int) -> None:
    _, expected = _layout(entry.tokens, entry.starts, id_type(vocab_size).itemsize)
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise _error(path, f"{what}: {size} bytes, expected {expected} for {entry.tokens} tokens")


def _error(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: {reason}; delete {path.parent} to rebuild the corpus")
