"""The run that a command line of launch/pretrain.py describes, and its counts."""

from collections.abc import Sequence

import torch
from omegaconf import OmegaConf

from seqtrain.config import compose_config
from seqtrain.data import load_tokenizer
from seqtrain.planning.counts import ModelCounts, count_model
from seqtrain.planning.layout import Layout
from seqtrain.runtime import PretrainConfig
from seqtrain.runtime.settings import micro_batch, typed_pretrain_config


def last_of_each(*words: str) -> list[str]:
    """`key=value` words, only the last of those with the same key."""
    return list({word.split("=")[0]: word for word in words}.values())


def read_run(overrides: Sequence[str]) -> PretrainConfig:
    """The config of a run; whether this machine could start it is not asked. Raises `ConfigError`."""
    values = OmegaConf.to_container(compose_config("pretrain", list(overrides)), resolve=True)
    return typed_pretrain_config(values)  # type: ignore[arg-type]


def layout_of(config: PretrainConfig) -> Layout:
    """How a run is divided."""
    parallel = config.parallel
    return Layout(
        parallel.data,
        parallel.sequence,
        parallel.zero_stage,
        config.model.activation_checkpointing,
        micro_batch(config),
        config.train.batch_size,
    )


def count_run(config: PretrainConfig, *, vocab_size: int = 0, rows: int = 1, shards: int = 0) -> ModelCounts:
    """The counts of one rank: `rows` of sequences sharded over `shards` ranks; 0: over `parallel.sequence`.

    `vocab_size`: 0 is that of data.tokenizer.
    """
    shards = shards or config.parallel.sequence
    return count_model(
        config.model,
        config.mixer,
        vocab_size or load_tokenizer(config.data).vocab_size,
        tokens=-(-config.train.sequence_length // shards),
        rows=rows,
        dtype=getattr(torch, config.train.dtype),
        backend=config.kernels.backend,
    )
