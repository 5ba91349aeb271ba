"""What `data.` describes, whichever kind it is: text that became token shards, or a synthetic task."""

from pathlib import Path

from seqtrain.data import corpus as text
from seqtrain.data.config import DataConfig
from seqtrain.data.corpus import Corpus
from seqtrain.data.sources import SOURCES
from seqtrain.data.synthetic import TASKS, SyntheticCorpus
from seqtrain.data.tokenizer import Tokenizer
from seqtrain.data.tokenizer import load_tokenizer as load_text_tokenizer
from seqtrain.errors import ConfigError, unknown_name


def check_source(config: DataConfig, *, sequence_length: int) -> None:
    """Raises `ConfigError` for an unknown `data.source`, and for a task's fields that are wrong or need longer rows."""
    if config.source in TASKS.names:
        SyntheticCorpus.of(config).task.check(sequence_length)
    elif config.source not in SOURCES.names:
        raise ConfigError(unknown_name("data.source", config.source, [*SOURCES.names, *TASKS.names]))
    elif config.task:
        raise ConfigError(f"data.task.{next(iter(config.task))}: data.source={config.source} is text, not a task")


def prepare(config: DataConfig, *, progress: bool = True) -> Corpus | SyntheticCorpus:
    """The corpus of `config`, made where it isn't there yet (see `seqtrain.data.corpus.prepare`), or its task."""
    if config.source in TASKS.names:
        return SyntheticCorpus.of(config)
    return text.prepare(config, progress=progress)


def open_corpus(folder: Path | str, config: DataConfig) -> Corpus | SyntheticCorpus:
    """What `prepare` made in `folder`, opened as workers on other machines do; a task has nothing there."""
    if config.source in TASKS.names:
        return SyntheticCorpus.of(config)
    return text.open_corpus(folder, config)


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer `data.tokenizer` names. Raises `ConfigError` for a task, whose tokens stand for no text."""
    if config.source in TASKS.names:
        raise ConfigError(f"data.source={config.source}: tokens of a synthetic task stand for no text")
    return load_text_tokenizer(config)
