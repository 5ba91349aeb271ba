"""A corpus on disk: its shards, and what its manifest says of them.

A shard has a header, token ids, and where documents start, in one file that is read through memory maps.

    bytes 0-7   magic b"seqtrain"       8-11 version        12-15 bytes per id (2, 4)       16-23 tokens
    24-31       document starts         32-39 vocab_size    40-63 zero
    64-         ids, little endian, padded with zeros to a multiple of 8; then the starts, int64, rising

A start is a position in this shard. A document may continue in the next shard: only its start is written.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from seqtrain.errors import DataError
from seqtrain.files import Manifest, publish, sha256_of

MAGIC = b"seqtrain"
SHARD_VERSION = 1
HEADER = struct.Struct("<8sIIQQQ24x")
# Ids looked at in one go when a shard is checked.
CHECKED = 2**20
# The two small files of a corpus folder: what it holds once it is whole, and what of it is finished until then.
VERSION = 1
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
REBUILD = "delete the folder to rebuild the corpus"


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file's name inside the folder, how many tokens and document starts it holds, its checksum."""

    file: str
    tokens: int
    starts: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """One side of the corpus.

    `bytes`: of its text. `token_bytes`: the same counted from its tokens, which differs where a tokenizer normalises.
    `first_bytes`: those of the first token of every document, which nothing predicts. `content`: a hash of its text,
    piece by piece, however it lies in shards; empty in a corpus of an earlier version.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    token_bytes: int = 0
    first_bytes: int = 0
    content: str = ""
    shards: list[ShardEntry] = field(default_factory=list)


@dataclass(frozen=True)
class SourceEntry:
    """Which source the text came from, and from how many files."""

    name: str
    files: int


@dataclass(frozen=True)
class TokenizerEntry:
    """Which tokenizer made the ids."""

    name: str
    identity: str
    vocab_size: int
    end: int


@dataclass(frozen=True)
class CorpusManifest(Manifest):
    """What a whole corpus says of itself. `bigrams_sha256`: checksum of the byte-bigram counts next to it."""

    remedy = REBUILD

    version: int
    key: str
    source: SourceEntry
    tokenizer: TokenizerEntry
    empty_documents: int
    train: SplitEntry
    held_out: SplitEntry
    bigrams_sha256: str


@dataclass(frozen=True)
class Cursor:
    """Where ingesting resumes: `offset` bytes into `document` of `part` (0 `data.path`, 1 `data.held_out_path`).

    `previous`: the byte before, or -1 at a document's start.
    """

    part: int = 0
    document: int = 0
    offset: int = 0
    previous: int = -1


@dataclass(frozen=True)
class IngestProgress(Manifest):
    """What is finished of a corpus that is not whole yet: `groups` of shards, and everything counted so far."""

    remedy = REBUILD

    key: str
    groups: int = 0
    cursor: Cursor = Cursor()
    empty_documents: int = 0
    # Units of the sources that are done, for the progress bar.
    units: float = 0.0
    train: SplitEntry = SplitEntry()
    held_out: SplitEntry = SplitEntry()


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises `DataError` for a name that leads anywhere else, also by way of a link."""
    file = folder / name
    plain = Path(name).name == name and name not in ("", ".", "..") and "\0" not in name
    # A pipe would be waited for.
    if not plain or file.is_symlink() or (file.exists() and not file.is_file()):
        raise DataError(
            f"{folder / MANIFEST}: names the file {name!r}; shards must be plain files of that folder itself"
        )
    return file


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
        self._starts: list[np.ndarray] = []
        self._dtype = id_type(vocab_size)
        self._unfinished = file.with_name(f"{file.name}.tmp")
        self._opened = self._unfinished.open("wb")
        self._opened.write(bytes(HEADER.size))

    def append(self, ids: np.ndarray, starts: np.ndarray) -> None:
        """Adds `ids`, of which those at the positions `starts` begin a document."""
        self._opened.write(ids.astype(self._dtype).tobytes())
        self._starts.append(starts.astype("<i8") + self.tokens)
        self.tokens += len(ids)

    def close(self) -> ShardEntry:
        """Finishes the file, which then has its name."""
        starts = np.concatenate(self._starts)
        offset, _ = _layout(self.tokens, len(starts), self._dtype.itemsize)
        self._opened.write(bytes(offset - self._opened.tell()))
        self._opened.write(starts.tobytes())
        self._opened.seek(0)
        fields = (MAGIC, SHARD_VERSION, self._dtype.itemsize, self.tokens, len(starts), self.vocab_size)
        self._opened.write(HEADER.pack(*fields))
        self._opened.close()
        publish(self._unfinished, self.file)
        return ShardEntry(self.file.name, self.tokens, len(starts), sha256_of(self.file))

    def abandon(self) -> None:
        """Closes the file without finishing it; the next run starts this shard again."""
        self._opened.close()


@dataclass(frozen=True)
class Shard:
    """A finished shard, read through memory maps."""

    path: Path
    entry: ShardEntry
    vocab_size: int

    @classmethod
    def open(cls, folder: Path, entry: ShardEntry, vocab_size: int) -> "Shard":
        """Checks header and size of the shard `entry` names, without reading it. Raises `DataError`."""
        shard = cls(inside(folder, entry.file), entry, vocab_size)
        shard._check_header()
        return shard

    def ids(self) -> np.ndarray:
        """A new map of the ids: uint16 or uint32 `[tokens]`."""
        return np.memmap(self.path, id_type(self.vocab_size), "r", HEADER.size, (self.entry.tokens,))

    def starts(self) -> np.ndarray:
        """A new map of the positions in this shard at which documents start: int64 `[starts]`."""
        if self.entry.starts == 0:
            return np.empty(0, dtype=np.int64)
        offset, _ = _layout(self.entry.tokens, self.entry.starts, id_type(self.vocab_size).itemsize)
        return np.memmap(self.path, "<i8", "r", offset, (self.entry.starts,))

    def verify(self) -> None:
        """Reads the whole shard: checksum, ids below the vocabulary, starts that rise. Raises `DataError`."""
        came = sha256_of(self.path)
        if came != self.entry.sha256:
            raise self._error(
                f"checksum is {came[:12]}, the manifest says {self.entry.sha256[:12]}: the file is damaged"
            )
        ids = self.ids()
        for at in range(0, self.entry.tokens, CHECKED):
            foreign = ids[at : at + CHECKED] >= self.vocab_size
            if foreign.any():
                place = at + int(np.argmax(foreign))
                offset = HEADER.size + place * ids.itemsize
                raise self._error(f"id {ids[place]} at byte {offset}, but ids are below {self.vocab_size}")
        boundaries = np.concatenate([[-1], self.starts(), [self.entry.tokens]])
        if not (np.diff(boundaries) > 0).all():
            raise self._error("document starts do not rise inside the shard")

    def _check_header(self) -> None:
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as opened:
                header = opened.read(HEADER.size)
        except OSError as error:
            raise self._error(f"can't be read ({error.strerror})") from None
        itemsize = id_type(self.vocab_size).itemsize
        _, expected = _layout(self.entry.tokens, self.entry.starts, itemsize)
        if size != expected:
            what = "truncated" if size < expected else "too long"
            raise self._error(f"{what}: {size} bytes, expected {expected} for {self.entry.tokens} tokens")
        magic, version, came_itemsize, tokens, starts, vocab_size = HEADER.unpack(header)
        if magic != MAGIC:
            raise self._error(f"not a token shard: it starts with {magic!r}")
        if version != SHARD_VERSION:
            raise self._error(f"shard version {version}, this seqtrain reads {SHARD_VERSION}")
        if vocab_size != self.vocab_size:
            raise self._error(f"made for {vocab_size} token ids, but the tokenizer has {self.vocab_size}")
        came = (came_itemsize, tokens, starts)
        if came != (itemsize, self.entry.tokens, self.entry.starts):
            expected_fields = (itemsize, self.entry.tokens, self.entry.starts)
            raise self._error(f"header says {came} for (bytes per id, tokens, starts), the manifest {expected_fields}")

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self.path}: {reason}; delete {self.path.parent} to rebuild the corpus")
