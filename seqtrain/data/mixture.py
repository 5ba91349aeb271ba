"""What `data.` describes: one corpus, one task, or a mixture of several in shares that follow from the step alone."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path

from seqtrain.data import corpus as single
from seqtrain.data.batches import WHOLE_BATCH, Batch, Batches, BatchSlice, EvaluationBatches, Layout, Row, RowBatches
from seqtrain.data.config import DataConfig
from seqtrain.data.corpus import Corpus
from seqtrain.data.entries import Entry, entries
from seqtrain.data.pool import Pools
from seqtrain.data.shares import Shares
from seqtrain.data.synthetic import TASKS, SyntheticBatches, SyntheticCorpus
from seqtrain.data.tokenizer import Tokenizer, load_tokenizer
from seqtrain.errors import ConfigError, SeqtrainError

# Between the names of the parts' folders in that of a mixture, which is theirs side by side and holds nothing itself.
BESIDE = "+"


@dataclass(frozen=True)
class Mixture:
    """Several corpora and tasks, read row by row in shares that follow from their weights."""

    entries: Sequence[Entry]
    parts: Sequence[Corpus | SyntheticCorpus]
    tokenizer: Tokenizer
    config: DataConfig

    def training_batches(self, *, seed: int, sequence_length: int, batch_size: int) -> "MixtureBatches":
        """As `Corpus.training_batches`."""
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
        parts = []
        for number, part in enumerate(self.parts):
            with _named(number):
                parts.append(part.training_batches(seed=seed, **sizes))
        layout = Layout(
            sequence_length, self.tokenizer.end, self.config.reset_at_documents, _lengths(self.config, sequence_length)
        )
        shares = Shares([entry.weight for entry in self.entries], batch_size)
        return MixtureBatches([entry.name for entry in self.entries], parts, shares, layout)

    def held_out_batches(self, *, sequence_length: int, batch_size: int, max_tokens: int) -> "HeldOutParts":
        """As `Corpus.held_out_batches`; every part has the same share of `max_tokens`."""
        sizes = {"sequence_length": sequence_length, "batch_size": batch_size}
        each = -(-max_tokens // len(self.parts))
        batches = [part.held_out_batches(max_tokens=each, **sizes) for part in self.parts]
        names = [entry.name for entry in self.entries]
        return HeldOutParts({name: part for name, part in zip(names, batches, strict=True) if len(part)})

    @property
    def folder(self) -> Path:
        """Where `open_corpus` finds the parts."""
        folders = [part.folder for part in self.parts]
        return max(folders).parent / BESIDE.join(folder.name for folder in folders)

    @property
    def texts(self) -> Mapping[str, Corpus]:
        """The parts that are no tasks, by name."""
        named = zip(self.entries, self.parts, strict=True)
        return {entry.name: part for entry, part in named if isinstance(part, Corpus)}

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bytes_per_token(self) -> float | None:
        """As that of a corpus, by the shares at the first step; None where tasks are among the parts."""
        if len(self.texts) < len(self.parts):
            return None
        shares = Shares([entry.weight for entry in self.entries], 1).at(0)
        return sum(share * part.bytes_per_token for share, part in zip(shares, self.texts.values(), strict=True))

    @property
    def content(self) -> dict[str, str]:
        """As that of a corpus: of all parts, in their order."""
        parts = [part.content for part in self.parts]
        return {"text": sha256(json.dumps(parts).encode()).hexdigest(), "tokenizer": self.tokenizer.identity}

    @property
    def about(self) -> str:
        """What a log says of it."""
        shares = Shares([entry.weight for entry in self.entries], 1).at(0)
        parts = zip(self.entries, shares, self.parts, strict=True)
        return "; ".join(f"{entry.name} {share:.1%}: {part.about}" for entry, share, part in parts)


@dataclass(frozen=True)
class MixtureBatches(RowBatches):
    """Training batches of rows that several sources deal, each row from one of them."""

    names: Sequence[str]
    parts: Sequence[Batches | SyntheticBatches]
    shares: Shares
    # One for the rows of all.
    common: Layout

    @property
    def layout(self) -> Layout:
        return self.common

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        return self.shares.batch_size

    @cached_property
    def _dealt(self) -> Callable[[int], list[tuple[int, int]]]:
        # A step is asked for once a row.
        return lru_cache(maxsize=4)(self.shares.deal)

    def row(self, number: int) -> Row:
        step, place = divmod(number, self.batch_size)
        source, row = self._dealt(step)[place]
        return self.parts[source].row(row)

    def at(self, index: int, part: BatchSlice = WHOLE_BATCH) -> Batch:
        """As `RowBatches.at`."""
        sources = tuple(self._dealt(index)[place][0] for place in part.rows(self.batch_size) or range(1))
        return replace(super().at(index, part), sources=sources)

    def epochs(self, batches: int) -> dict[str, float]:
        """As `RowBatches.epochs`."""
        counted = zip(self.names, self.parts, self.shares.counts(batches * self.batch_size), strict=True)
        return {f"epochs/{name}": part.epochs_of(rows) for name, part, rows in counted if isinstance(part, Batches)}


@dataclass(frozen=True)
class HeldOutParts:
    """What the parts of a mixture are scored on, by name; those without held-out text are left out."""

    parts: Mapping[str, EvaluationBatches | SyntheticBatches]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))


def check_source(config: DataConfig, *, sequence_length: int) -> None:
    """Raises `ConfigError` for unknown sources, and for fields of tasks that are wrong or need longer rows."""
    _lengths(config, sequence_length)
    if not config.sources:
        if config.lengths and config.source in TASKS.names:
            raise ConfigError(f"data.lengths: rows of data.source={config.source}, a task, are not cut; leave it out")
        single.check_source(config, sequence_length=sequence_length)
        return
    for number, entry in enumerate(entries(config)):
        with _named(number):
            single.check_source(entry.config, sequence_length=sequence_length)


def prepare(
    config: DataConfig, *, progress: bool = True, pools: Pools | None = None
) -> Corpus | SyntheticCorpus | Mixture:
    """The task `config` names, its corpus as `corpus.prepare` makes it, or those of a mixture, one after the other."""
    if not config.sources:
        return single.prepare(config, progress=progress, pools=pools)
    tokenizer = load_tokenizer(config)
    found, parts = entries(config), []
    for number, entry in enumerate(found):
        with _named(number):
            parts.append(single.prepare(entry.config, progress=progress, pools=pools))
    return _mixed(config, found, parts, tokenizer)


def open_corpus(
    folder: Path | str, config: DataConfig, *, tokenizer: Tokenizer | None = None
) -> Corpus | SyntheticCorpus | Mixture:
    """As `corpus.open_corpus`; of a mixture every part, in the folders that `folder` names side by side."""
    if not config.sources:
        return single.open_corpus(folder, config, tokenizer=tokenizer)
    tokenizer = tokenizer or load_tokenizer(config)
    found, names = entries(config), Path(folder).name.split(BESIDE)
    assert len(found) == len(names), (found, names)
    parts = [
        single.open_corpus(Path(folder).parent / name, entry.config, tokenizer=tokenizer)
        for entry, name in zip(found, names, strict=True)
    ]
    return _mixed(config, found, parts, tokenizer)


def _mixed(
    config: DataConfig, found: Sequence[Entry], parts: Sequence[Corpus | SyntheticCorpus], tokenizer: Tokenizer
) -> Mixture:
    for number, (entry, part) in enumerate(zip(found, parts, strict=True)):
        if part.vocab_size > tokenizer.vocab_size:
            raise ConfigError(
                f"data.sources.{number}.{entry.config.source}: has ids up to {part.vocab_size - 1}, "
                f"data.tokenizer={config.tokenizer} only {tokenizer.vocab_size}; ask for fewer, or use a larger one"
            )
    return Mixture(found, parts, tokenizer, config)


def _lengths(config: DataConfig, sequence_length: int) -> Sequence[tuple[int, int]]:
    """`data.lengths`. Raises `ConfigError` where they are no lengths of parts of a row, by rising steps from 0 on."""
    steps = [step for step, _ in config.lengths]
    key = f"data.lengths={json.dumps(config.lengths)}"
    if steps != sorted(set(steps)) or steps[:1] not in ([], [0]):
        raise ConfigError(f"{key}: steps must rise, from 0 on, as in [[0, 512], [2000, 1024]]")
    for _, length in config.lengths:
        if length < 1 or sequence_length % length:
            raise ConfigError(f"{key}: {length} must divide train.sequence_length={sequence_length}")
    return config.lengths


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Says of which entry an error is."""
    try:
        yield
    except SeqtrainError as error:
        raise type(error)(f"data.sources.{number}: {error}") from None
