"""What a corpus on disk says of itself: its manifest, and of each split an index of the shards it lies in.

An index is a `.npy` of one row a shard, in the order of the text. It is mapped, so that opening a corpus costs the same
however many shards it has.
"""

import mmap
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from seqtrain.data.shards import Shard, ShardEntry, id_type, inside
from seqtrain.errors import DataError
from seqtrain.files import Manifest, replacing, sha256_of

# Version 1 lists its shards in the manifest; it is still read.
VERSION, VERSIONS = 2, (1, 2)
MANIFEST = "manifest.json"
BIGRAMS = "bigrams.npy"
REBUILD = "delete the folder to rebuild the corpus"
# `end`, `starts_end`: tokens and document starts up to this shard's end; `file`: its name; `sha256`: its checksum.
INDEX = np.dtype([("end", "<i8"), ("starts_end", "<i8"), ("file", "S48"), ("sha256", "S64")])


@dataclass(frozen=True)
class SplitEntry:
    """One side of the corpus.

    `bytes`: of its text. `token_bytes`: the same counted from its tokens, which differs where a tokenizer normalises.
    `first_bytes`: those of the first token of every document, which nothing predicts. `content`: a hash of its text,
    piece by piece, however it lies in shards; empty in a corpus of an earlier version. `index_sha256`: checksum of the
    index; where it is empty, `shards` are listed here.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    token_bytes: int = 0
    first_bytes: int = 0
    content: str = ""
    index_sha256: str = ""
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
    """What a whole corpus says of itself.

    `bigrams_sha256`: checksum of the byte-bigram counts next to it. `problems`: of documents, by reason, how many have
    it, and the first.
    """

    remedy = REBUILD

    version: int
    key: str
    source: SourceEntry
    tokenizer: TokenizerEntry
    empty_documents: int
    train: SplitEntry
    held_out: SplitEntry
    bigrams_sha256: str
    problems: dict[str, tuple[int, str]] = field(default_factory=dict)


def told_problems(problems: Mapping[str, tuple[int, str]]) -> str:
    """What is wrong with documents, to be added to a sentence; empty where nothing is."""
    found = [f"{count} {reason} (as {example})" for reason, (count, example) in sorted(problems.items())]
    return f", conversations {'; '.join(found)}" if found else ""


class ShardIndex:
    """Which shards a split lies in, in order. A shard is opened, and its header checked, when it is asked for."""

    def __init__(self, folder: Path, split: str, rows: np.ndarray, vocab_size: int):
        self.folder = folder
        self.split = split
        self.vocab_size = vocab_size
        # Numbers of those that were read from.
        self.touched: set[int] = set()
        self._rows = rows
        self._ends, self._starts_ends = self._rows["end"], self._rows["starts_end"]

    @classmethod
    def open(cls, folder: Path, split: str, entry: SplitEntry, vocab_size: int) -> "ShardIndex":
        """The index of a split whose entry in the manifest is `entry`. Raises `DataError`."""
        file = index_file(folder, split)
        if entry.index_sha256:
            try:
                rows = _mapped(file)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(f"{file}: can't be read ({error}); {REBUILD}") from None
        else:
            rows = _listed(folder, entry.shards)
        index = cls(folder, split, rows, vocab_size)
        if index.totals != (entry.tokens, entry.documents):
            raise DataError(
                f"{folder / MANIFEST}: {split} has {entry.tokens} tokens in {entry.documents} documents, its shards "
                f"{index.totals}"
            )
        return index

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def totals(self) -> tuple[int, int]:
        """Tokens and document starts of all shards."""
        return (int(self._rows["end"][-1]), int(self._rows["starts_end"][-1])) if len(self) else (0, 0)

    @property
    def bytes(self) -> int:
        """Size of all shards, about."""
        tokens, starts = self.totals
        return tokens * id_type(self.vocab_size).itemsize + 8 * starts

    def find(self, position: int) -> int:
        """The number of the shard that holds the token at `position` of the split."""
        return bisect_right(self._ends, position)

    def first(self, number: int) -> int:
        """The position of the split at which shard `number` begins."""
        return int(self._ends[number - 1]) if number else 0

    def find_document(self, document: int) -> int:
        """The number of the shard in which document number `document` of the split starts."""
        return bisect_right(self._starts_ends, document)

    def first_document(self, number: int) -> int:
        """The number of the document that starts first in shard `number`."""
        return int(self._starts_ends[number - 1]) if number else 0

    def entry(self, number: int) -> ShardEntry:
        """What the index says of a shard."""
        row, before = self._rows[number], self._rows[number - 1] if number else np.zeros((), INDEX)
        tokens, starts = (int(row[name] - before[name]) for name in ("end", "starts_end"))
        return ShardEntry(row["file"].decode(errors="replace"), tokens, starts, row["sha256"].decode(errors="replace"))

    def shard(self, number: int) -> Shard:
        """Opens a shard. Raises `DataError` for one that is missing, cut off or of another kind."""
        return Shard.open(self.folder, self.entry(number), self.vocab_size)


def index_file(folder: Path, split: str) -> Path:
    """Where the index of a split lies."""
    return folder / f"{split}.index.npy"


def write_index(folder: Path, split: str, tokens: np.ndarray, starts: np.ndarray, rows: np.ndarray) -> str:
    """Writes the index of a split, durably; gives its checksum.

    `tokens`, `starts`: int64 `[shards]`; `rows`: `INDEX` `[shards]` with names and checksums filled in.
    """
    set_ends(rows, tokens, starts)
    file = index_file(folder, split)
    with replacing(file) as unfinished, unfinished.open("wb") as opened:
        np.save(opened, rows, allow_pickle=False)
    return sha256_of(file)


def set_ends(rows: np.ndarray, tokens: ArrayLike, starts: ArrayLike) -> None:
    """Writes into the rows of an index where each shard ends, counted in tokens and in document starts."""
    rows["end"], rows["starts_end"] = (np.cumsum(numbers, dtype=np.int64) for numbers in (tokens, starts))


def _mapped(file: Path) -> np.ndarray:
    """The index in `file`, by one call of the file system; numpy's own way of mapping takes six."""
    with file.open("rb") as opened:
        np.lib.format.read_magic(opened)
        shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
        if dtype != INDEX or len(shape) != 1:
            raise ValueError(f"holds {dtype} {list(shape)}, not an index of shards")
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(content, INDEX, shape[0], opened.tell()) if shape[0] else np.zeros(0, INDEX)


def _listed(folder: Path, shards: Sequence[ShardEntry]) -> np.ndarray:
    """The index of a corpus whose manifest lists its shards."""
    rows = np.zeros(len(shards), INDEX)
    rows["file"] = [inside(folder, shard.file).name.encode() for shard in shards]
    rows["sha256"] = [shard.sha256.encode() for shard in shards]
    set_ends(rows, [shard.tokens for shard in shards], [shard.starts for shard in shards])
    return rows
