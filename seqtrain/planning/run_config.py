"""The run that a command line of launch/pretrain.py describes, and its counts."""

from collections.abc import Sequence
from functools import partial

import torch
from omegaconf import OmegaConf

from seqtrain.config import compose_config
from seqtrain.data import load_tokenizer
from seqtrain.parallel.tensor import TensorParallel
from seqtrain.planning.counts import ModelCounter, ModelCounts
from seqtrain.planning.layout import Layout
from seqtrain.runtime import PretrainConfig
from seqtrain.runtime.resolving import typed_pretrain_config
from seqtrain.runtime.settings import micro_batch, segments
from seqtrain.runtime.source import add_own_adapters


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
        "block" in config.model.recomputed,
        micro_batch(config),
        config.train.batch_size,
        parallel.experts,
        segments(config),
        config.train.segment_gradients == "exact",
        config.train.offload_activations,
        parallel.tensor,
        0 if parallel.shard_ranks == parallel.ranks // parallel.tensor else parallel.shard_ranks,
    )


def at_once(config: PretrainConfig, shards: int = 0, rows: int = 0) -> tuple[int, int]:
    """Tokens of a row that run through the model at once on a rank, at most, and how many such rows.

    `shards`: ranks per sequence, `rows`: sequences of a micro-batch; 0: the run's own.
    """
    rows, shards = rows or micro_batch(config), shards or config.parallel.sequence
    if (pieces := segments(config, rows)) == 1:
        return shard_tokens(config, shards), rows
    return -(-rows * config.train.sequence_length // (pieces * shards)), 1


def counter_of(config: PretrainConfig, vocab_size: int = 0, *, tensor: int = 0) -> ModelCounter:
    """What counts the run's model, one rank's part of it; `vocab_size`: 0 is that of data.tokenizer.

    `tensor`: ranks over which layers are divided; 0: as the run says. Raises `ConfigError` where they can't be.
    """
    return ModelCounter(
        config.model,
        config.mixer,
        vocab_size or load_tokenizer(config.data).vocab_size,
        dtype=getattr(torch, config.train.dtype),
        backend=config.kernels.backend,
        adapt=partial(add_own_adapters, config),
        tensor=TensorParallel(0, tensor or config.parallel.tensor),
    )


def shard_tokens(config: PretrainConfig, shards: int) -> int:
    """Tokens of a sequence that one of `shards` ranks has at most."""
    return -(-config.train.sequence_length // shards)


def count_run(config: PretrainConfig, *, vocab_size: int = 0, rows: int = 1, shards: int = 0) -> ModelCounts:
    """The counts of one rank: `rows` of sequences sharded over `shards` ranks; 0: over `parallel.sequence`.

    `vocab_size`: 0 is that of data.tokenizer.
    """
    tokens = shard_tokens(config, shards or config.parallel.sequence)
    return counter_of(config, vocab_size).count(tokens, rows)
