"""A prepared corpus: two streams of tokens over memory-mapped shards, and the tokenizer that made them."""

import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from seqtrain.data.batches import Batches, EvaluationBatches
from seqtrain.data.config import DataConfig
from seqtrain.data.ingest import BIGRAMS, content_key, ingest, open_sources
from seqtrain.data.manifest import (
    MANIFEST,
    REBUILD,
    VERSION,
    CorpusManifest,
    SplitEntry,
    inside,
)
from seqtrain.data.shards import Shard
from seqtrain.data.tokenizer import Tokenizer, load_tokenizer
from seqtrain.errors import ConfigError, DataError
from seqtrain.files import Manifest, sha256_of

log = logging.getLogger("seqtrain.data")

VERIFIED = "verified.json"
# Each open shard holds two file descriptors, of which a process may commonly have 1024.
OPEN_SHARDS = 64


class TokenStream:
    """One split as one long row of ids, its documents in order, each closed by the tokenizer's `end`."""

    def __init__(self, name: str, entry: SplitEntry, shards: list[Shard], tokenizer: Tokenizer):
        self.name = name
        self.documents = entry.documents
        self.tokens = entry.tokens
        self.bytes = entry.bytes
        self.tokenizer = tokenizer
        # Text bytes for each byte counted from tokens: 1 unless the tokenizer normalises its text.
        self.byte_scale = entry.bytes / entry.token_bytes if entry.token_bytes else 1.0
        # Bytes of everything that is predicted: all but the first token of each document.
        self.predicted_bytes = (entry.token_bytes - entry.first_bytes) * self.byte_scale
        self._shards = shards
        self._ends = list(accumulate(shard.entry.tokens for shard in shards))
        self._maps = lru_cache(maxsize=OPEN_SHARDS)(lambda number: (shards[number].ids(), shards[number].starts()))

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 `[stop - start]`: the ids at `start <= position < stop`, which must lie in the stream."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        parts = [self._maps(number)[0][low:high] for number, low, high in self._pieces(start, stop)]
        return np.concatenate(parts, dtype=np.int64) if parts else np.empty(0, dtype=np.int64)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """int64: the positions `start <= position < stop` at which a document starts, rising."""
        found = [np.empty(0, dtype=np.int64)]
        for number, low, high in self._pieces(start, stop):
            starts = self._maps(number)[1]
            first, last = np.searchsorted(starts, [low, high])
            found.append(starts[first:last] + (self._ends[number] - self._shards[number].entry.tokens))
        return np.concatenate(found)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """`(shard, from, to)`, counted inside the shard, for every shard that `start` to `stop` touches."""
        number = bisect_right(self._ends, start)
        while start < stop and number < len(self._ends):
            base = self._ends[number] - self._shards[number].entry.tokens
            end = min(stop, self._ends[number])
            yield number, start - base, end - base
            start = end
            number += 1


@dataclass(frozen=True)
class Corpus:
    """Tokens on disk in `folder`, open for reading. `bigrams`: file with the counts of byte pairs of both splits."""

    folder: Path
    manifest: CorpusManifest
    tokenizer: Tokenizer
    train: TokenStream
    held_out: TokenStream
    # Whether a document's start clears the state of every layer.
    reset_at_documents: bool

    def training_batches(self, *, seed: int, sequence_length: int, batch_size: int) -> Batches:
        """The batches of a run; `batch_size`: sequences in a step, all ranks together."""
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
        return Batches(self.train, seed=seed, reset_at_documents=self.reset_at_documents, **sizes)

    def held_out_batches(self, *, sequence_length: int, batch_size: int, max_tokens: int) -> EvaluationBatches:
        """What a model is scored on: at most about `max_tokens` tokens, 0 for all."""
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
        limit = -(-max_tokens // sequence_length)
        return EvaluationBatches(self.held_out, reset_at_documents=self.reset_at_documents, limit=limit, **sizes)

    @property
    def bigrams(self) -> Path:
        return self.folder / BIGRAMS

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def about(self) -> str:
        """What a log says of it."""
        return f"{self.folder}, {self.train.tokens} tokens to train on, {self.held_out.tokens} held out"


@dataclass(frozen=True)
class Stamps(Manifest):
    """Size and mtime in ns of the files whose checksums held when they were last read whole."""

    remedy = REBUILD

    files: dict[str, tuple[int, int]] = field(default_factory=dict)


def prepare(config: DataConfig, *, progress: bool = True) -> Corpus:
    """The corpus `config` describes: made now, finished if a run was stopped in the middle, or opened if it is there.

    Corpora lie in `data.cache_dir` under a key of the text's files, the tokenizer and the settings, so changed text
    makes a new one. Processes that want the same one at once wait for the first. `progress` shows a bar on stderr
    while text is read. Raises `ConfigError` or `DataError`, naming the key or the file.
    """
    sources = open_sources(config)
    tokenizer = load_tokenizer(config)
    key = content_key(config, sources, tokenizer)
    folder = cache_folder(config) / f"{config.source}-{key[:16]}"
    if not (folder / MANIFEST).exists():
        with _locked(folder), _bar(sources[0].unit, sum(s.total for s in sources), show=progress) as report:
            if not (folder / MANIFEST).exists():
                ingest(config, sources, tokenizer, folder, key, report)
    return open_corpus(folder, config, tokenizer=tokenizer)


def open_corpus(folder: Path | str, config: DataConfig, *, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the corpus in `folder` without looking at the text it came from, as workers on other machines do.

    Sizes and headers of all shards are checked, checksums as `data.verify` says. Raises `DataError` naming the file.
    """
    folder = Path(folder)
    tokenizer = tokenizer or load_tokenizer(config)
    manifest = CorpusManifest.read(folder / MANIFEST)
    if manifest.version != VERSION:
        raise DataError(
            f"{folder / MANIFEST}: version {manifest.version}, this seqtrain reads {VERSION}; delete the folder"
        )
    if manifest.tokenizer.identity != tokenizer.identity:
        raise DataError(
            f"{folder / MANIFEST}: made with another tokenizer "
            f"({manifest.tokenizer.name}, {manifest.tokenizer.vocab_size} ids) "
            f"than data.tokenizer={config.tokenizer} ({tokenizer.vocab_size} ids)"
        )
    splits = {"train": manifest.train, "held_out": manifest.held_out}
    opened = {name: _open_shards(folder, name, split, tokenizer) for name, split in splits.items()}
    _verify(folder, manifest, [shard for shards in opened.values() for shard in shards], config.verify)
    streams = {name: TokenStream(name, split, opened[name], tokenizer) for name, split in splits.items()}
    return Corpus(folder, manifest, tokenizer, **streams, reset_at_documents=config.reset_at_documents)


def cache_folder(config: DataConfig) -> Path:
    """`data.cache_dir`, or the user's cache folder."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("seqtrain"))


def _open_shards(folder: Path, name: str, split: SplitEntry, tokenizer: Tokenizer) -> list[Shard]:
    shards = [Shard.open(folder, entry, tokenizer.vocab_size) for entry in split.shards]
    came = (sum(shard.entry.tokens for shard in shards), sum(shard.entry.starts for shard in shards))
    if came != (split.tokens, split.documents):
        raise DataError(
            f"{folder / MANIFEST}: {name} has {split.tokens} tokens in {split.documents} documents, its shards {came}"
        )
    return shards


def _verify(folder: Path, manifest: CorpusManifest, shards: list[Shard], when: str) -> None:
    if when == "never":
        return
    stamps = Stamps.read(folder / VERIFIED).files if (folder / VERIFIED).exists() else {}
    now = {shard.path.name: _stamp(shard.path) for shard in shards}
    for shard in shards:
        if when == "always" or stamps.get(shard.path.name) != now[shard.path.name]:
            shard.verify()
    counts = inside(folder, BIGRAMS)
    if not counts.exists() or sha256_of(counts) != manifest.bigrams_sha256:
        raise DataError(f"{counts}: missing or damaged; delete {folder} to rebuild the corpus")
    if now != stamps and os.access(folder, os.W_OK):
        Stamps(now).write(folder / VERIFIED)


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a corpus that is being made; the system lets go of it when its holder dies."""
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_name(folder.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            log.info("data: another process is making %s; waiting for it", folder.name)
            lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: can't write in {folder.parent} ({error.strerror}); choose another"
        ) from None
    try:
        yield
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        raise DataError(f"{reason}; finished shards are kept; rerun to resume") from error
    finally:
        lock.release()


@contextmanager
def _bar(unit: str, total: int, *, show: bool) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr; the function it yields is told how many units are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("text to tokens"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)
