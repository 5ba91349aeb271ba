"""One group of shards: a stretch of text, read piece by piece, tokenized batch by batch, written durably."""

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seqtrain.data.bigram import SHAPE, count_pairs
from seqtrain.data.config import DataConfig
from seqtrain.data.manifest import SplitEntry
from seqtrain.data.progress import Group, SectionState
from seqtrain.data.sections import Section
from seqtrain.data.shards import ShardWriter
from seqtrain.data.sources import Document, Source
from seqtrain.data.sources._base import AROUND, Cursor
from seqtrain.data.sources._compressed import compression
from seqtrain.data.tokenizer import Tokenizer, load_tokenizer
from seqtrain.errors import DataError
from seqtrain.files import replace_file, sync

SPLITS = ("train", "held_out")
# Text tokenized in one go. Groups end between batches, so this and the shard size decide where, never how often we
# stopped.
BATCH_BYTES = 2**21
# A batch of many short rows ends here: each takes memory besides its text.
BATCH_PIECES = 4096

Report = Callable[[float], None]


@dataclass(frozen=True)
class Job:
    """What a process is told that makes the next group of a section; all of it can be sent to another machine.

    `sources`: with the section's files only. `folder`: of the corpus, where all processes see it.
    """

    config: DataConfig
    sources: list[Source]
    tokenizer_identity: str
    folder: Path
    section: Section
    state: SectionState
    # Names of its shards, by split.
    names: dict[str, str]


@dataclass(frozen=True)
class Piece:
    """A stretch of one document. `before`: some of the text in front of it; `after`: where ingesting resumes."""

    document: Document
    data: bytes
    before: bytes
    previous: int
    last: bool
    after: Cursor

    @property
    def units(self) -> float:
        if self.document.size == 0:
            return self.document.units
        return self.document.units * len(self.data) / self.document.size


class Encoded(NamedTuple):
    """A piece with its ids; `counted`: which of them are predicted, None for all."""

    piece: Piece
    ids: np.ndarray
    counted: np.ndarray | None


def make_group(job: Job, tokenizer: Tokenizer, report: Report = lambda units: None) -> Group:
    """Makes the next group of a section durable; `report` is told the units of the section that are done."""
    group = _GroupWriter(job, tokenizer)
    try:
        for batch in _batches(job, tokenizer):
            group.add(batch)
            report(group.units)
            if group.tokens >= job.config.shard_tokens:
                return group.commit(whole=False)
        return group.commit(whole=True)
    finally:
        group.abandon()


def make_group_alone(job: Job) -> Group:
    """The same in a process that is told no more than the job."""
    return make_group(job, _tokenizer(job.config.tokenizer, job.config.end_token, job.tokenizer_identity))


@lru_cache(maxsize=1)
def _tokenizer(path: str, end_token: str, identity: str) -> Tokenizer:
    """Read once in a process that makes many groups."""
    tokenizer = load_tokenizer(DataConfig(tokenizer=path, end_token=end_token))
    if tokenizer.identity != identity:
        raise DataError(f"data.tokenizer={path}: is not the same in all processes that tokenize; rerun")
    return tokenizer


class _GroupWriter:
    """The two shards being written, and everything counted with them."""

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self.folder = job.folder
        self.state = job.state
        self.tokenizer = tokenizer
        self.cursor = job.state.cursor
        self.empty, self.units = job.state.empty_documents, job.state.units
        self.problems = dict(job.state.problems)
        section, groups = job.section.number, job.state.groups
        counts = read_counts(job.folder / counts_name(section, groups)) if groups else np.zeros((2, *SHAPE), int)
        entries = (job.state.train, job.state.held_out)
        self.splits = {
            split: _SplitWriter(job.folder / job.names[split], tokenizer, entry, bigrams)
            for split, entry, bigrams in zip(SPLITS, entries, counts, strict=True)
        }

    @property
    def tokens(self) -> int:
        return sum(split.writer.tokens for split in self.splits.values() if split.writer)

    def add(self, batch: list[Piece]) -> None:
        filled = [piece for piece in batch if piece.document.size]
        self.empty += len(batch) - len(filled)
        for document in (piece.document for piece in batch if piece.previous < 0):
            for reason, came in document.problems.items():
                count, example = self.problems.get(reason, (0, f"{document.name}{came and f' ({came})'}"))
                self.problems[reason] = (count + 1, example)
        encoded = [Encoded(*each) for each in zip(filled, *_encoded(self.tokenizer, filled), strict=True)]
        for split, held_out in (("train", False), ("held_out", True)):
            chosen = [each for each in encoded if each.piece.document.held_out is held_out]
            if chosen:
                self.splits[split].add(chosen)
        self.cursor = batch[-1].after
        self.units += sum(piece.units for piece in batch)

    def commit(self, *, whole: bool) -> Group:
        """Makes shards and counts durable; they count once the log names them."""
        groups = self.state.groups + 1
        shards = {name: split.writer.close() for name, split in self.splits.items() if split.writer}
        changed = {name: self.splits[name].file.stat().st_mtime_ns for name in shards}
        counts = io.BytesIO()
        np.savez_compressed(counts, counts=np.stack([split.bigrams for split in self.splits.values()]))
        replace_file(self.folder / counts_name(self.state.section, groups), counts.getvalue())
        sync(self.folder)
        train, held_out = (split.entry for split in self.splits.values())
        section = self.state.section
        counted = (self.empty, self.problems, self.units, train, held_out)
        state = SectionState(section, self.cursor, groups, whole, *counted)
        return Group(state, shards, changed)

    def abandon(self) -> None:
        for split in self.splits.values():
            if split.writer:
                split.writer.abandon()


class _SplitWriter:
    def __init__(self, file: Path, tokenizer: Tokenizer, entry: SplitEntry, bigrams: np.ndarray):
        self.file = file
        self.tokenizer = tokenizer
        self.entry = entry
        self.bigrams = bigrams
        self.writer: ShardWriter | None = None

    def add(self, encoded: list[Encoded]) -> None:
        if self.writer is None:
            self.writer = ShardWriter(self.file, self.tokenizer.vocab_size)
        pieces = [each.piece for each in encoded]
        lengths = np.array([len(each.ids) for each in encoded])
        first = np.array([piece.previous < 0 for piece in pieces])
        ids = np.concatenate([each.ids for each in encoded])
        starts = (np.cumsum(lengths) - lengths)[first]
        counted = [each.counted for each in encoded if each.counted is not None]
        self.writer.append(ids, starts, np.concatenate(counted) if counted else None)
        self.bigrams += count_pairs([(piece.data, piece.previous, piece.last) for piece in pieces])
        # Marks of a conversation are no text.
        size = self.tokenizer.byte_count(ids) if counted else sum(len(piece.data) for piece in pieces)
        self.entry = replace(
            self.entry,
            documents=self.entry.documents + len(starts),
            tokens=self.entry.tokens + len(ids),
            bytes=self.entry.bytes + size,
            token_bytes=self.entry.token_bytes + self.tokenizer.byte_count(ids),
            first_bytes=self.entry.first_bytes + self.tokenizer.byte_count(ids[starts]),
            content=_chained(self.entry.content, pieces),
        )


def _encoded(tokenizer: Tokenizer, pieces: list[Piece]) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """The ids of each piece, a document's last with its `end`; and which of them are predicted, None where all are."""
    if all(piece.document.learned is None for piece in pieces):
        found = tokenizer.encode_pieces([piece.data for piece in pieces], [piece.before for piece in pieces])
        ends = [np.array([tokenizer.end] if piece.last else [], dtype=np.int64) for piece in pieces]
        return [np.concatenate(parts) for parts in zip(found, ends, strict=True)], [None] * len(pieces)
    ids: list[np.ndarray] = []
    counted: list[np.ndarray | None] = []
    texts = [piece.data.decode("utf-8") for piece in pieces]
    for piece, text, (own, begins) in zip(pieces, texts, tokenizer.encode_marked(texts), strict=True):
        spans = piece.document.learned or ()
        learned = np.zeros(len(text), dtype=bool)
        for start, stop in spans:
            learned[start:stop] = True
        # A last turn that has no mark of its own ends with the document.
        marked = (tokenizer.token_bytes[own[begins >= spans[-1][0]]] == 0).any()
        ids.append(np.append(own, tokenizer.end))
        counted.append(np.append(learned[begins], learned[-1] and not marked))
    return ids, counted


def _chained(content: str, pieces: list[Piece]) -> str:
    """The hash of text whose first part has the hash `content`, and which goes on with `pieces`."""
    digest = hashlib.sha256(content.encode())
    for piece in pieces:
        digest.update(piece.data + bytes([piece.last]))
    return digest.hexdigest()


def _batches(job: Job, tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    room = BATCH_BYTES
    for piece in _pieces(job, tokenizer):
        batch.append(piece)
        room -= len(piece.data)
        if room <= 0 or len(batch) >= BATCH_PIECES:
            yield batch
            batch, room = [], BATCH_BYTES
    if batch:
        yield batch


def _pieces(job: Job, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Every piece of the section that is left; an empty document is one piece without text."""
    cursor, end = job.state.cursor, job.section.end
    while cursor.part < len(job.sources):
        part = cursor.part
        for document in job.sources[part].documents(cursor.place):
            here = (part, document.place)
            if (*here, cursor.offset) >= (end.part, end.place, end.offset):
                return
            stop = end.offset if here == (end.part, end.place) else document.size
            yield from _pieces_of(job.config, document, cursor, stop, tokenizer)
            if stop < document.size:
                return
            cursor = Cursor(part, document.next_place)
            if cursor[:3] >= end[:3]:
                return
        cursor = Cursor(part + 1)


def _pieces_of(
    config: DataConfig, document: Document, cursor: Cursor, stop: int, tokenizer: Tokenizer
) -> Iterator[Piece]:
    """The pieces of a document from where `cursor` stands in it up to byte `stop`."""
    after = Cursor(cursor.part, document.next_place)
    if document.size == 0:
        yield Piece(document, b"", b"", -1, True, after)
    previous = cursor.previous
    for raw, offset in document.pieces(cursor.offset, stop, ends=tokenizer.ends_token):
        start = offset - len(raw)
        data = _checked(config, document, raw, start)
        before = document.read(max(0, start - AROUND), min(start, AROUND)) if start else b""
        last = offset >= document.size
        resumed = after if last else Cursor(cursor.part, document.place, offset, data[-1])
        yield Piece(document, data, before, previous, last, resumed)
        previous = data[-1]


def _checked(config: DataConfig, document: Document, raw: bytes, offset: int) -> bytes:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if config.invalid_utf8 == "replace":
            return raw.decode("utf-8", errors="replace").encode("utf-8")
        if kind := "" if offset else compression(raw):
            raise DataError(f"{document.name}: is {kind}-compressed; unpack it, or move it away") from None
        place = f"byte {offset + error.start} is 0x{raw[error.start]:02x}"
        way_out = "data.invalid_utf8=replace puts U+FFFD in its place"
        raise DataError(f"{document.name}: not UTF-8: {place}; {way_out}") from None
    return raw


def counts_name(section: int | str, groups: int | str) -> str:
    """The file with the counts of byte pairs of a section after so many groups; `"*"` stands for any."""
    numbers = (number if isinstance(number, str) else f"{number:05d}" for number in (section, groups))
    return "bigrams-" + "-".join(numbers) + ".npz"


def read_counts(file: Path) -> np.ndarray:
    """int64 `[2, 256, 257]`: the counts of a section that has been begun."""
    with np.load(file, allow_pickle=False) as opened:
        counts: np.ndarray = opened["counts"]
    return counts
