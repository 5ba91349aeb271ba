"""Command lines that mix a launcher's overrides with a tool's own settings, `name.key=value`."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from _settings import read_settings
from omegaconf import OmegaConf

from seqtrain.analysis.counts import ModelCounts, count_model
from seqtrain.config import compose_config
from seqtrain.data import load_tokenizer
from seqtrain.runtime import PretrainConfig
from seqtrain.runtime.compose import typed_pretrain_config

T = TypeVar("T")


def split_settings(cls: type[T], name: str, arguments: Sequence[str], *, about: str | None) -> tuple[T, list[str]]:
    """The settings given as `name.key=value`, and all other arguments. `--help` and mistakes as in `read_settings`."""
    prefix = f"{name}."
    own = [word.removeprefix(prefix) for word in arguments if word.startswith(prefix) or word in ("-h", "--help")]
    others = [word for word in arguments if not word.startswith(prefix)]
    return read_settings(cls, own, about=about), others


def last_of_each(*words: str) -> list[str]:
    """`key=value` words, of those with the same key the last one alone."""
    return list({word.split("=")[0]: word for word in words}.values())


def read_run(overrides: Sequence[str]) -> PretrainConfig:
    """The config of a run; whether this machine could start it is not asked. Raises `ConfigError`."""
    values = OmegaConf.to_container(compose_config("pretrain", list(overrides)), resolve=True)
    return typed_pretrain_config(values)  # type: ignore[arg-type]


def count_run(config: PretrainConfig, *, vocab_size: int = 0, rows: int = 1, pieces: int = 0) -> ModelCounts:
    """The counts of one rank: `rows` of sequences cut into `pieces`; 0: as `parallel.sequence` cuts them.

    `vocab_size`: 0 is that of data.tokenizer.
    """
    pieces = pieces or config.parallel.sequence
    return count_model(
        config.model,
        config.mixer,
        vocab_size or load_tokenizer(config.data).vocab_size,
        tokens=-(-config.train.sequence_length // pieces),
        rows=rows,
        dtype=getattr(torch, config.train.dtype),
        backend=config.kernels.backend,
    )
