"""Text to shards: stopped at any instant, it resumes at the last finished group and ends in the very same bytes.

A group is one training and one held-out shard written together. When both together are full, they are made
durable, and `progress.json` names them with the place in the text at which the next group starts. Anything else in
the folder is a leftover.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from seqtrain.data.bigram import SHAPE, count_pairs, read_counts
from seqtrain.data.config import DataConfig
from seqtrain.data.shards import (
    MANIFEST,
    PROGRESS,
    VERSION,
    CorpusManifest,
    Cursor,
    IngestProgress,
    Shard,
    ShardWriter,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
)
from seqtrain.data.sources import SOURCES, Document, Source
from seqtrain.data.sources._base import AROUND, PIECE_BYTES, Part
from seqtrain.data.sources._compressed import compression
from seqtrain.data.tokenizer import ByteTokenizer, Tokenizer
from seqtrain.errors import DataError
from seqtrain.files import replace_file, sha256_of, sync

log = logging.getLogger("seqtrain.data")

BIGRAMS = "bigrams.npy"
# Text tokenized in one go. Groups end between batches, so this and the shard size decide where, never how often we
# stopped.
BATCH_BYTES = 2**21
# A batch of many short rows ends here: each takes memory besides its text.
BATCH_PIECES = 4096

# Documents looked at before any is tokenized.
FIRST_DOCUMENTS = 1000

Report = Callable[[float], None]


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


def open_sources(config: DataConfig) -> list[Source]:
    """The text of `data.path` and, where given, that of `data.held_out_path`."""
    kind = SOURCES.get(config.source)
    if not config.held_out_path:
        return [kind(config, Part("data.path", config.path, config.held_out))]
    train, held_out = Part("data.path", config.path, 0.0), Part("data.held_out_path", config.held_out_path, 1.0)
    return [kind(config, train), kind(config, held_out)]


def left_out(sources: list[Source]) -> str:
    """What is not read of the text, and why, to be added to a sentence; empty where all of it is."""
    return "".join(source.passed_over for source in sources)


def check_first_documents(config: DataConfig, sources: list[Source]) -> None:
    """Raises `DataError` where the first documents can't be read, or are all there are and none is held out."""
    count = 0
    for document in islice(sources[0].documents(), FIRST_DOCUMENTS):
        count += document.size > 0
        if document.held_out:
            return
    if 0 < count < FIRST_DOCUMENTS and config.held_out and not config.held_out_path:
        raise _nothing_held_out(config, count)


def _nothing_held_out(config: DataConfig, documents: int) -> DataError:
    return DataError(
        f"data.held_out={config.held_out}: no document of the {documents} in {config.path or config.source} was held "
        "out; raise it, name a file as data.held_out_path, or set data.held_out=0"
    )


def content_key(config: DataConfig, sources: list[Source], tokenizer: Tokenizer) -> str:
    """A hash of all that decides the shards: the text's files (name, size, time), the tokenizer, the settings."""
    settings = [config.source, config.held_out, config.text_field, config.invalid_utf8, config.shard_tokens]
    # Bytes are their own tokens wherever text is cut; other corpora were cut without looking around once.
    cut = [] if isinstance(tokenizer, ByteTokenizer) else [AROUND]
    parts = [VERSION, PIECE_BYTES, BATCH_BYTES, BATCH_PIECES, tokenizer.identity, settings, *cut]
    content = json.dumps([parts, [source.fingerprint() for source in sources]])
    return hashlib.sha256(content.encode()).hexdigest()


def ingest(
    config: DataConfig, sources: list[Source], tokenizer: Tokenizer, folder: Path, key: str, report: Report
) -> None:
    """Makes the corpus in `folder`, or resumes making it. `report` is told the units of text done so far.

    The caller holds the folder's lock. Raises `DataError` for text that can't be read, and where a split stays empty.
    """
    progress = _resume(folder, key, tokenizer)
    report(progress.units)
    group = _Group(folder, progress, tokenizer)
    done = progress.units
    try:
        for batch in _batches(config, sources, progress.cursor, tokenizer):
            group.add(batch)
            done += sum(piece.units for piece in batch)
            report(done)
            if group.tokens >= config.shard_tokens:
                progress = group.commit(batch[-1].after, done)
                group = _Group(folder, progress, tokenizer)
        if group.tokens:
            progress = group.commit(group.cursor, done)
        progress = replace(progress, empty_documents=group.empty)
    finally:
        group.abandon()
    _finish(config, sources, tokenizer, folder, progress)


def _resume(folder: Path, key: str, tokenizer: Tokenizer) -> IngestProgress:
    """What is finished in `folder`, which is created; leftovers of a run that was stopped are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = IngestProgress.read(folder / PROGRESS) if (folder / PROGRESS).exists() else IngestProgress(key)
    if progress.key != key:
        raise DataError(f"{folder / PROGRESS}: belongs to another corpus; delete the folder and run again")
    kept = {PROGRESS, _counts_name(progress.groups)}
    for entry in progress.train.shards + progress.held_out.shards:
        kept.add(Shard.open(folder, entry, tokenizer.vocab_size).path.name)
    for file in folder.iterdir():
        if file.name not in kept:
            file.unlink()
    if progress.groups:
        log.info("data: resuming %s after %d finished groups of shards", folder.name, progress.groups)
    return progress


class _Group:
    """The two shards being written, and everything counted with them."""

    def __init__(self, folder: Path, progress: IngestProgress, tokenizer: Tokenizer):
        self.folder = folder
        self.progress = progress
        self.tokenizer = tokenizer
        self.cursor = progress.cursor
        self.empty = progress.empty_documents
        counts = (
            read_counts(folder / _counts_name(progress.groups)) if progress.groups else np.zeros((2, *SHAPE), np.int64)
        )
        self.splits = {
            "train": _SplitWriter("train", self, progress.train, counts[0]),
            "held_out": _SplitWriter("held_out", self, progress.held_out, counts[1]),
        }

    @property
    def tokens(self) -> int:
        return sum(split.writer.tokens for split in self.splits.values() if split.writer)

    def add(self, batch: list[Piece]) -> None:
        filled = [piece for piece in batch if piece.document.size]
        self.empty += len(batch) - len(filled)
        ids = self.tokenizer.encode_pieces([piece.data for piece in filled], [piece.before for piece in filled])
        for split, held_out in (("train", False), ("held_out", True)):
            chosen = [(p, i) for p, i in zip(filled, ids, strict=True) if p.document.held_out is held_out]
            if chosen:
                self.splits[split].add(chosen)
        self.cursor = batch[-1].after

    def commit(self, cursor: Cursor, units: float) -> IngestProgress:
        """Makes shards and counts durable, then says so in `progress.json`: until then nothing has happened."""
        groups = self.progress.groups + 1
        entries = {name: split.close() for name, split in self.splits.items()}
        counts = io.BytesIO()
        np.save(counts, np.stack([split.bigrams for split in self.splits.values()]), allow_pickle=False)
        replace_file(self.folder / _counts_name(groups), counts.getvalue())
        progress = IngestProgress(
            self.progress.key, groups, cursor, self.empty, units, entries["train"], entries["held_out"]
        )
        sync(self.folder)
        progress.write(self.folder / PROGRESS)
        (self.folder / _counts_name(groups - 1)).unlink(missing_ok=True)
        return progress

    def abandon(self) -> None:
        for split in self.splits.values():
            if split.writer:
                split.writer.abandon()


class _SplitWriter:
    def __init__(self, name: str, group: _Group, entry: SplitEntry, bigrams: np.ndarray):
        self.file = group.folder / f"{name}-{group.progress.groups:05d}.bin"
        self.tokenizer = group.tokenizer
        self.entry = entry
        self.bigrams = bigrams
        self.writer: ShardWriter | None = None

    def add(self, pieces: list[tuple[Piece, np.ndarray]]) -> None:
        if self.writer is None:
            self.writer = ShardWriter(self.file, self.tokenizer.vocab_size)
        end = np.array([self.tokenizer.end])
        parts = [part for piece, ids in pieces for part in ((ids, end) if piece.last else (ids,))]
        lengths = np.array([len(ids) + piece.last for piece, ids in pieces])
        first = np.array([piece.previous < 0 for piece, _ in pieces])
        ids = np.concatenate(parts)
        starts = (np.cumsum(lengths) - lengths)[first]
        self.writer.append(ids, starts)
        self.bigrams += count_pairs([(piece.data, piece.previous, piece.last) for piece, _ in pieces])
        self.entry = replace(
            self.entry,
            documents=self.entry.documents + len(starts),
            tokens=self.entry.tokens + len(ids),
            bytes=self.entry.bytes + sum(len(piece.data) for piece, _ in pieces),
            token_bytes=self.entry.token_bytes + self.tokenizer.byte_count(ids),
            first_bytes=self.entry.first_bytes + self.tokenizer.byte_count(ids[starts]),
            content=_chained(self.entry.content, [piece for piece, _ in pieces]),
        )

    def close(self) -> SplitEntry:
        if self.writer is None:
            return self.entry
        return replace(self.entry, shards=[*self.entry.shards, self.writer.close()])


def _chained(content: str, pieces: list[Piece]) -> str:
    """The hash of text whose first part has the hash `content`, and which goes on with `pieces`."""
    digest = hashlib.sha256(content.encode())
    for piece in pieces:
        digest.update(piece.data + bytes([piece.last]))
    return digest.hexdigest()


def _batches(config: DataConfig, sources: list[Source], cursor: Cursor, tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    room = BATCH_BYTES
    for piece in _pieces(config, sources, cursor, tokenizer):
        batch.append(piece)
        room -= len(piece.data)
        if room <= 0 or len(batch) >= BATCH_PIECES:
            yield batch
            batch, room = [], BATCH_BYTES
    if batch:
        yield batch


def _pieces(config: DataConfig, sources: list[Source], cursor: Cursor, tokenizer: Tokenizer) -> Iterator[Piece]:
    """Every piece from `cursor` on; an empty document is one piece without text."""
    for part in range(cursor.part, len(sources)):
        for number, document in enumerate(sources[part].documents(cursor.document), start=cursor.document):
            after = Cursor(part, number + 1)
            if document.size == 0:
                yield Piece(document, b"", b"", -1, True, after)
            previous = cursor.previous
            for raw, offset in document.pieces(cursor.offset, ends=tokenizer.ends_token):
                start = offset - len(raw)
                data = _checked(config, document, raw, start)
                before = document.read(max(0, start - AROUND), min(start, AROUND)) if start else b""
                last = offset >= document.size
                resumed = after if last else Cursor(part, number, offset, data[-1])
                yield Piece(document, data, before, previous, last, resumed)
                previous = data[-1]
            cursor = after
        cursor = Cursor(part + 1)


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


def _finish(
    config: DataConfig, sources: list[Source], tokenizer: Tokenizer, folder: Path, progress: IngestProgress
) -> None:
    where = config.path or config.source
    if not progress.train.documents:
        raise DataError(f"data.path: no text to train on in {where} ({progress.empty_documents} empty documents)")
    if not progress.held_out.documents and (config.held_out or config.held_out_path):
        raise _nothing_held_out(config, progress.train.documents)
    if content_key(config, sources, tokenizer) != progress.key:
        raise DataError(f"data.path: {where} changed while it was read; run again")
    # A copy, for a run stopped here must find the counts again.
    replace_file(folder / BIGRAMS, (folder / _counts_name(progress.groups)).read_bytes())
    manifest = CorpusManifest(
        version=VERSION,
        key=progress.key,
        source=SourceEntry(config.source, sum(len(source.files) for source in sources)),
        tokenizer=TokenizerEntry(Path(config.tokenizer).name, tokenizer.identity, tokenizer.vocab_size, tokenizer.end),
        empty_documents=progress.empty_documents,
        train=progress.train,
        held_out=progress.held_out,
        bigrams_sha256=sha256_of(folder / BIGRAMS),
    )
    manifest.write(folder / MANIFEST)
    documents = progress.train.documents + progress.held_out.documents
    told = left_out(sources)
    log.log(
        logging.WARNING if told else logging.INFO,
        "data: read %d documents of %d files, and %d empty ones%s",
        documents,
        manifest.source.files,
        progress.empty_documents,
        told,
    )
    (folder / _counts_name(progress.groups)).unlink()
    (folder / PROGRESS).unlink()


def _counts_name(groups: int) -> str:
    return f"bigrams-{groups:05d}.npy"
