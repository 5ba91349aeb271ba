"""What `data.` describes, whichever kind it is: text that became token shards, or a synthetic task."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from seqtrain.data import verification
from seqtrain.data.batches import Batches, EvaluationBatches
from seqtrain.data.chat import KNOWN_ROLES
from seqtrain.data.config import DataConfig
from seqtrain.data.ingest import Text, check_first_documents, ingest, left_out, open_sources, tidy
from seqtrain.data.manifest import (
    BIGRAMS,
    MANIFEST,
    VERSIONS,
    CorpusManifest,
    ShardIndex,
    index_file,
    told_problems,
)
from seqtrain.data.masking import Masking
from seqtrain.data.packing import Packing, Windows, make_packing
from seqtrain.data.pool import Pools, local_pools
from seqtrain.data.progress import PROGRESS
from seqtrain.data.sources import SOURCES, Source
from seqtrain.data.sources._tokens import TokenFiles
from seqtrain.data.stream import TokenStream
from seqtrain.data.synthetic import TASKS, SyntheticCorpus
from seqtrain.data.token_files import StretchIndex, token_manifest
from seqtrain.data.tokenizer import Tokenizer, load_tokenizer
from seqtrain.errors import ConfigError, DataError, SeqtrainError, unknown_name
from seqtrain.files import LARGEST_RECORD, sha256_of

log = logging.getLogger("seqtrain.data")


@dataclass(frozen=True)
class Corpus:
    """Tokens on disk in `folder`, open for reading. `bigrams`: file with the counts of byte pairs of both splits."""

    folder: Path
    manifest: CorpusManifest
    tokenizer: Tokenizer
    train: TokenStream
    held_out: TokenStream
    config: DataConfig
    # What of `data.path` was not read, and why, for a log; known where the text is.
    left_out: str = ""

    def training_batches(self, *, seed: int, sequence_length: int, batch_size: int) -> Batches:
        """The batches of a run; `batch_size`: sequences in a step, all ranks together."""
        packing = make_packing(self.config, self.train, length=sequence_length, seed=seed)
        if self.config.packing != "stream":
            log.info("data.packing=%s: rows are %.1f%% full", self.config.packing, 100 * packing.fill)
        reset, lengths = self.config.reset_at_documents, self.config.lengths
        options: dict[str, Any] = {"reset_at_documents": reset, "lengths": lengths, "masking": self._masking(seed)}
        return Batches(packing, batch_size=batch_size, **options)

    def held_out_batches(self, *, sequence_length: int, batch_size: int, max_tokens: int) -> EvaluationBatches:
        """What a model is scored on: at most about `max_tokens` tokens, 0 for all."""
        packing: Packing = Windows(self.held_out, length=sequence_length)
        if self.config.packing != "stream":
            packing = make_packing(self.config, self.held_out, length=sequence_length, seed=0)
        limit, reset = -(-max_tokens // sequence_length), self.config.reset_at_documents
        options: dict[str, Any] = {"reset_at_documents": reset, "limit": limit, "masking": self._masking(0)}
        return EvaluationBatches(packing, batch_size=batch_size, **options)

    def _masking(self, seed: int) -> Masking | None:
        share = self.config.masked
        return Masking(share, self.tokenizer.vocab_size, seed) if share else None

    @property
    def texts(self) -> "Mapping[str, Corpus]":
        """The corpora that it consists of, by the names of their sources, which one alone has none of."""
        return {"": self}

    @property
    def indexes(self) -> tuple[ShardIndex, ShardIndex]:
        """The shards of both splits."""
        return self.train.shards, self.held_out.shards

    @property
    def to_verify(self) -> tuple[ShardIndex, ...]:
        """Shards that weren't verified when the corpus was opened, since they are too many, but are to be."""
        large = sum(shards.bytes for shards in self.indexes) > verification.AT_ONCE
        return self.indexes if large and self.config.verify != "never" else ()

    @property
    def bigrams(self) -> Path:
        return self.folder / BIGRAMS

    @property
    def vocab_size(self) -> int:
        # The mask is one more.
        return self.tokenizer.vocab_size + (self.config.masked > 0)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text that a token of the training side stands for, on average."""
        return self.manifest.train.bytes / max(self.manifest.train.tokens, 1)

    @property
    def content(self) -> dict[str, str]:
        """What a checkpoint remembers of it: hashes of the text, wherever it lay, and of the tokenizer."""
        splits = self.manifest.train, self.manifest.held_out
        parts = [split.content or [shard.sha256 for shard in split.shards] for split in splits]
        return {"text": sha256(json.dumps(parts).encode()).hexdigest(), "tokenizer": self.tokenizer.identity}

    @property
    def about(self) -> str:
        """What a log says of it."""
        held_out = f"{self.held_out.tokens} held out, {self.manifest.empty_documents} empty documents"
        problems = told_problems(self.manifest.problems)
        return f"{self.folder}, {self.train.tokens} tokens to train on, {held_out}{self.left_out}{problems}"


def check_source(config: DataConfig, *, sequence_length: int) -> None:
    """Raises `ConfigError` for an unknown `data.source`, and for a task's fields that are wrong or need longer rows."""
    if config.source in TASKS.names:
        SyntheticCorpus.of(config).task.check(sequence_length)
        if config.packing != "stream":
            raise ConfigError(f"data.packing={config.packing}: data.source={config.source} is a task, which fills rows")
        if config.carry_rows > 1:
            raise ConfigError(f"data.carry_rows={config.carry_rows}: data.source={config.source} is a task; use 1")
    elif config.source not in SOURCES.names:
        raise ConfigError(unknown_name("data.source", config.source, [*SOURCES.names, *TASKS.names]))
    elif config.task:
        raise ConfigError(f"data.task.{next(iter(config.task))}: data.source={config.source} is text, not a task")
    if config.source == "chat" and (not config.train_roles or set(config.train_roles) - set(KNOWN_ROLES)):
        raise ConfigError(f"data.train_roles={config.train_roles}: takes one or more of {', '.join(KNOWN_ROLES)}")
    if config.documents_per_row and config.packing != "best_fit":
        raise ConfigError(
            f"data.documents_per_row={config.documents_per_row}: data.packing={config.packing} has no use for it; "
            "use data.packing=best_fit"
        )


def prepare(config: DataConfig, *, progress: bool = True, pools: Pools | None = None) -> Corpus | SyntheticCorpus:
    """The task `config` names, or its corpus: made now, finished if a run was stopped in the middle, or opened.

    Corpora lie in `data.cache_dir` under a key of the text's files, the tokenizer and the settings, so changed text
    makes a new one. Processes that want the same one at once wait for the first. `progress` shows a bar on stderr
    while text is read; `pools`: who reads it, by default processes of this machine. Raises `ConfigError` or
    `DataError`, naming the key or the file.
    """
    if config.source in TASKS.names:
        return SyntheticCorpus.of(config)
    sources, tokenizer = _opened(config)
    if found := [source for source in sources if isinstance(source, TokenFiles)]:
        return _in_place(config, found, tokenizer)
    text = Text(config, sources, tokenizer)
    folder, before = (cache_folder(config) / f"{config.source}-{key[:16]}" for key in (text.key, text.undivided_key))
    if not (folder / MANIFEST).exists() and (before / MANIFEST).exists():
        folder = before
    if not (folder / MANIFEST).exists():
        with _locked(folder), _bar(sources[0].unit, sum(s.total for s in sources), show=progress) as report:
            if not (folder / MANIFEST).exists():
                ingest(text, folder, report, pools or local_pools(config.workers))
    elif (folder / PROGRESS).exists():
        # Whoever made it was stopped at the very end.
        with _locked(folder):
            tidy(folder)
    corpus = open_corpus(folder, config, tokenizer=tokenizer)
    assert isinstance(corpus, Corpus)
    if corpus.to_verify:
        _verify_index(corpus)
    return replace(corpus, left_out=left_out(sources))


def _in_place(config: DataConfig, sources: list[TokenFiles], tokenizer: Tokenizer) -> Corpus:
    """The corpus whose tokens lie in `sources`; its folder holds only what it says of itself."""
    files = [[str(source.root), *source.fingerprint()] for source in sources]
    settings = [config.source, config.held_out, tokenizer.identity]
    key = sha256(json.dumps([settings, files]).encode()).hexdigest()
    folder = cache_folder(config) / f"{config.source}-{key[:16]}"
    if not (folder / MANIFEST).exists():
        with _locked(folder):
            manifest = token_manifest(config, sources, tokenizer, key)
            folder.mkdir(exist_ok=True)
            manifest.write(folder / MANIFEST)
    corpus = open_corpus(folder, config, tokenizer=tokenizer)
    assert isinstance(corpus, Corpus)
    return replace(corpus, left_out=left_out(list(sources)))


def _opened(config: DataConfig) -> tuple[list[Source], Tokenizer]:
    """Text and tokenizer. Raises one error with all that can be known to be wrong before the text is read whole."""
    wrong: list[SeqtrainError] = []
    found: list[Any] = []
    for part in (open_sources, load_tokenizer):
        try:
            found.append(part(config))
            if part is open_sources and not isinstance(found[0][0], TokenFiles):
                check_first_documents(config, found[0])
        except SeqtrainError as error:
            wrong.append(error)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise ConfigError("; ".join(map(str, wrong)))
    return found[0], found[1]


def open_corpus(
    folder: Path | str, config: DataConfig, *, tokenizer: Tokenizer | None = None
) -> Corpus | SyntheticCorpus:
    """Opens the corpus in `folder` without looking at the text it came from, as workers on other machines do.

    Checksums are compared as `data.verify` says; a shard's header and size when it is first read. Raises `DataError`
    naming the file. A task has nothing there.
    """
    if config.source in TASKS.names:
        return SyntheticCorpus.of(config)
    folder = Path(folder)
    tokenizer = tokenizer or load_tokenizer(config)
    manifest = CorpusManifest.read(folder / MANIFEST)
    if manifest.version not in VERSIONS:
        raise DataError(
            f"{folder / MANIFEST}: version {manifest.version}, this seqtrain reads {VERSIONS}; delete the folder"
        )
    if manifest.tokenizer.identity != tokenizer.identity:
        raise DataError(
            f"{folder / MANIFEST}: made with another tokenizer "
            f"({manifest.tokenizer.name}, {manifest.tokenizer.vocab_size} ids) "
            f"than data.tokenizer={config.tokenizer} ({tokenizer.vocab_size} ids)"
        )
    streams, kind = {}, SOURCES.get(config.source)
    if issubclass(kind, TokenFiles):
        # Nobody has checksums of all of them: each is compared with what it was when it is opened.
        config = replace(config, verify="never")
    for name, split in (("train", manifest.train), ("held_out", manifest.held_out)):
        if issubclass(kind, TokenFiles):
            shards: ShardIndex = StretchIndex(kind, name, split)
        else:
            shards = ShardIndex.open(folder, name, split, tokenizer.vocab_size)
        streams[name] = TokenStream(name, split, shards, tokenizer)
    corpus = Corpus(folder, manifest, tokenizer, streams["train"], streams["held_out"], config)
    # Of what is large, ranks open what they read, and nothing else.
    if config.verify != "never" and not corpus.to_verify:
        _verify_index(corpus)
        verification.verify_at_once(corpus.indexes, always=config.verify == "always")
    return corpus


def cache_folder(config: DataConfig) -> Path:
    """`data.cache_dir`, or the user's cache folder."""
    if config.cache_dir:
        return Path(config.cache_dir).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("seqtrain"))


def _verify_index(corpus: Corpus) -> None:
    """Compares checksums of what a corpus has besides its shards. Raises `DataError`."""
    folder, manifest = corpus.folder, corpus.manifest
    splits = (("train", manifest.train), ("held_out", manifest.held_out))
    entries = ((index_file(folder, split), entry.index_sha256) for split, entry in splits)
    for file, checksum in ((folder / BIGRAMS, manifest.bigrams_sha256), *entries):
        small = file.is_file() and not file.is_symlink() and file.stat().st_size <= LARGEST_RECORD
        if checksum and not (small and sha256_of(file) == checksum):
            raise DataError(f"{file}: missing, or not what {MANIFEST} says; delete {folder} to rebuild the corpus")


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
