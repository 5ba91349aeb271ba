"""Token files of other makers, read in place: each split is stretches of them, one after the other."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from seqtrain.data.config import DataConfig
from seqtrain.data.manifest import (
    VERSION,
    CorpusManifest,
    ShardIndex,
    SourceEntry,
    SplitEntry,
    TokenizerEntry,
    set_ends,
)
from seqtrain.data.shards import ShardEntry
from seqtrain.data.sources._tokens import TokenFile, TokenFiles
from seqtrain.data.tokenizer import Tokenizer
from seqtrain.errors import DataError

# Tokens that are looked at in so many places: for ids beyond the vocabulary, and for the bytes a token stands for.
LOOKED_AT, PLACES = 2**14, 64
# Bytes at the start and the end of a file that its checksum is of: the whole may take hours to read.
EDGES = 2**20


@dataclass(frozen=True)
class Stretch:
    """Whole documents that follow each other in a file, as a shard of a corpus."""

    file: TokenFile
    first: int
    tokens: int

    @cached_property
    def _starts(self) -> np.ndarray:
        starts = self.file.starts
        low, high = np.searchsorted(starts, [self.first, self.first + self.tokens])
        return starts[low:high] - self.first

    def ids(self) -> np.ndarray:
        """A map of the ids: integers `[tokens]`."""
        return self.file.ids()[self.first : self.first + self.tokens]

    def starts(self) -> np.ndarray:
        """int64: where documents start in it, rising."""
        return self._starts

    def counted(self, start: int, stop: int) -> np.ndarray:
        """bool `[stop - start]`: whether those tokens are predicted."""
        return self.file.counted(self.first + start, self.first + stop)


class StretchIndex(ShardIndex):
    """The stretches of a split. A file is opened when it is first read."""

    def __init__(self, kind: type[TokenFiles], split: str, entry: SplitEntry):
        rows = np.zeros(len(entry.shards), [("end", "<i8"), ("starts_end", "<i8")])
        set_ends(rows, [shard.tokens for shard in entry.shards], [shard.starts for shard in entry.shards])
        super().__init__(Path(), split, rows, 0)
        self.kind, self.shards = kind, entry.shards

    def shard(self, number: int) -> Stretch:  # type: ignore[override]
        entry = self.shards[number]
        file = _opened(self.kind, entry.file, entry.sha256)  # type: ignore[arg-type]
        # What is held out of a file is its end.
        first = file.tokens - entry.tokens if self.split == "held_out" else 0
        if first < 0 or _edges(self.kind.belonging(file.path)) != entry.sha256:
            raise DataError(f"{entry.file}: isn't what it was when the run was prepared; start the run again")
        return Stretch(file, first, entry.tokens)


@cache
def _opened(kind: type[TokenFiles], file: str, sha256: str) -> TokenFile:
    """The file whose checksum was this when the run was prepared: another one is opened anew."""
    return kind.open(Path(file))


def token_manifest(config: DataConfig, sources: Sequence[TokenFiles], tokenizer: Tokenizer, key: str) -> CorpusManifest:
    """What a corpus that is read in place says of itself. Raises `DataError` for damaged files and ids of others."""
    pieces: dict[str, list[Stretch]] = {"train": [], "held_out": []}
    for source in sources:
        for split, stretch in _divided([source.open(file.absolute()) for file in source.files], source.part.held_out):
            pieces[split].append(stretch)
    splits = {split: _entry(type(sources[0]), found, tokenizer) for split, found in pieces.items()}
    if not splits["train"].tokens:
        raise DataError(f"data.path: no tokens to train on in {config.path}")
    if not splits["held_out"].tokens and (config.held_out or config.held_out_path):
        raise DataError(
            f"data.held_out={config.held_out}: no document at the end of {config.path} is so short; raise it, name "
            "other files as data.held_out_path, or set data.held_out=0"
        )
    files = SourceEntry(config.source, sum(len(source.files) for source in sources))
    name = TokenizerEntry(Path(config.tokenizer).name, tokenizer.identity, tokenizer.vocab_size, tokenizer.end)
    return CorpusManifest(VERSION, key, files, name, 0, splits["train"], splits["held_out"], "")


def _divided(files: list[TokenFile], held_out: float) -> Iterator[tuple[str, Stretch]]:
    """The files as stretches of both splits: whole documents at the end of all are held out, up to that share."""
    room = held_out * sum(file.tokens for file in files)
    left = [file.tokens for file in files]
    for number in reversed(range(len(files))):
        starts, end = files[number].starts, files[number].tokens
        wanted = starts[np.searchsorted(starts, end - room)] if len(starts) and starts[-1] >= end - room else end
        left[number] = int(wanted)
        room -= end - left[number]
        if left[number]:
            break
    for split, ends in (("train", left), ("held_out", [file.tokens for file in files])):
        for file, cut, end in zip(files, left, ends, strict=True):
            first = 0 if split == "train" else cut
            if end > first:
                yield split, Stretch(file, first, end - first)


def _entry(kind: type[TokenFiles], stretches: list[Stretch], tokenizer: Tokenizer) -> SplitEntry:
    checksums = [_edges(kind.belonging(each.file.path)) for each in stretches]
    shards = [
        ShardEntry(str(each.file.path), each.tokens, len(each.starts()), checksum)
        for each, checksum in zip(stretches, checksums, strict=True)
    ]
    tokens, documents = (sum(getattr(shard, name) for shard in shards) for name in ("tokens", "starts"))
    # Of the text nothing is known but what a part of its tokens stand for.
    seen = [ids for stretch in stretches for ids in _looked_at(stretch, tokenizer.vocab_size)]
    size = sum(map(len, seen))
    number = round(sum(map(tokenizer.byte_count, seen)) * tokens / size) if size else 0
    content = hashlib.sha256(json.dumps([[shard.tokens, shard.starts, shard.sha256] for shard in shards]).encode())
    return SplitEntry(documents, tokens, number, number, 0, content.hexdigest(), "", shards)


def _looked_at(stretch: Stretch, vocab_size: int) -> Iterator[np.ndarray]:
    """Some of its ids, from its start to its end. Raises `DataError` for one that is none of the tokenizer's."""
    ids = stretch.ids()
    for place in sorted({stretch.tokens * number // PLACES for number in range(PLACES)}):
        found = np.asarray(ids[place : place + LOOKED_AT], dtype=np.int64)
        foreign = (found < 0) | (found >= vocab_size)
        if foreign.any():
            at = int(np.argmax(foreign))
            raise DataError(
                f"{stretch.file.path}: id {found[at]} at token {stretch.first + place + at}, but data.tokenizer has "
                f"{vocab_size}; name the tokenizer that made the file"
            )
        yield found


def _edges(files: Sequence[Path]) -> str:
    """A checksum of files' sizes, starts and ends."""
    digest = hashlib.sha256()
    for file in files:
        if not file.is_file():
            continue
        with file.open("rb") as opened:
            size = opened.seek(0, 2)
            digest.update(f"{file.suffix} {size} ".encode())
            for place in (0, max(0, size - EDGES)):
                opened.seek(place)
                digest.update(opened.read(EDGES))
    return digest.hexdigest()
